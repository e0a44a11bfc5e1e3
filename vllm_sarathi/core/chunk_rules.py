"""Where a prompt may be cut: not inside an image that must be whole, and in some models at the ends of blocks only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkRules:
    """Where the next chunks of one prompt may end; positions are tokens from the start of the prompt.

    Attributes:
        whole: spans [start, end) that must be in one step each, in their order, apart from one another.
        multiple: a chunk that does not end the prompt ends at a multiple of this.
        tail_tokens: a chunk leaves nothing of the prompt, or at least this number of tokens.
    """

    whole: tuple[tuple[int, int], ...] = ()
    multiple: int = 1
    tail_tokens: int = 0

    def fit(self, start: int, end: int, tokens: int) -> int:
        """Return the largest chunk of at most `tokens` from `start` in a prompt that ends at `end`; 0 for none."""
        if tokens >= end - start:
            return end - start
        return max(0, self._allowed(start + tokens, end) - start)

    def least(self, start: int, end: int) -> int:
        """Return the smallest chunk from `start` that is allowed: a smaller budget prefills nothing."""
        cut = start + 1
        while cut < end:
            allowed = self._next(cut, end)
            if allowed == cut:
                return cut - start
            cut = allowed
        return end - start

    def _allowed(self, cut: int, end: int) -> int:
        """Return the last position up to `cut` where the prompt may be cut."""
        before = cut + 1
        while cut < before:
            before = cut
            if cut < end:
                cut = min(cut, end - self.tail_tokens)
                cut -= cut % self.multiple
            for first, last in self.whole:
                if first < cut < last:
                    cut = first
        return cut

    def _next(self, cut: int, end: int) -> int:
        """Return a position from `cut` on, before which the prompt may not be cut."""
        cut += -cut % self.multiple
        for first, last in self.whole:
            if first < cut < last:
                cut = last
        return end if cut > end - self.tail_tokens else cut


ANYWHERE = ChunkRules()
"""No rule: most prompts can be cut after any token."""
