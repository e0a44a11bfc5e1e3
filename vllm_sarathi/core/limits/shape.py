"""Where the last chunk of a step ends: at the end of its prompt, at the end of a tile, or before something uncut."""

from vllm_sarathi.core.chunk_rules import ANYWHERE
from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate, LastChunk, encoder_tokens, last_chunk
from vllm_sarathi.core.types import Reason, RequestView, StepView, chunk_work

TAIL_SHARE = 1 / 16
TAIL_OVERRUN = 1.02
"""A chunk that would leave less than the share of itself is completed if the step then overruns by 2% at most."""

TILE_TOKENS = 16
ALIGNMENT_LOSS = 1 / 16
"""A budget is cut down to whole tiles where that loses at most this share of the chunk."""


class Tail:
    """Completes a prompt that would leave a tail of a few tokens."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if candidate.reason is not Reason.SLO or (last := last_chunk(candidate)) is None:
            return candidate.tokens, candidate.reason
        request = last.request
        left = request.remaining_tokens - last.tokens
        if not 0 < left <= TAIL_SHARE * last.tokens:
            return candidate.tokens, candidate.reason
        tokens = last.before + request.remaining_tokens
        work = last.work + chunk_work(request.done_tokens, request.remaining_tokens)
        limit_s = TAIL_OVERRUN * candidate.available_s / self._experience.model.margin
        encoder = last.encoder + encoder_tokens(request, request.remaining_tokens)
        fits = self._experience.seconds(view, tokens, work, last.prompts, encoder) <= limit_s
        return (tokens if fits else candidate.tokens), candidate.reason


class Tile:
    """Ends a chunk at a whole tile of the step's tokens, where the part of a tile beyond that is not worth its time.

    Args:
        experience: what is known of the device.
    """

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if candidate.reason is not Reason.SLO or (last := last_chunk(candidate)) is None:
            return candidate.tokens, candidate.reason
        total = view.decode_tokens + candidate.tokens
        over = total % self._experience.model.tile_tokens
        if 0 < over < last.tokens and self._is_quicker_without(view, candidate.tokens, last, over):
            return candidate.tokens - over, candidate.reason
        over = total % TILE_TOKENS
        if last.tokens < last.request.remaining_tokens and over <= ALIGNMENT_LOSS * last.tokens:
            return candidate.tokens - over, candidate.reason
        return candidate.tokens, candidate.reason

    def _is_quicker_without(self, view: StepView, tokens: int, last: LastChunk, over: int) -> bool:
        """True where a step without its last `over` tokens prefills more of them in a second."""
        seconds, done = self._experience.seconds, last.request.done_tokens
        work = last.work + chunk_work(done, last.tokens)
        less = last.work + chunk_work(done, last.tokens - over)
        step_s = seconds(
            view, tokens, work, last.prompts, last.encoder + encoder_tokens(last.request, last.tokens)
        )
        encoder = last.encoder + encoder_tokens(last.request, last.tokens - over)
        return (tokens - over) * step_s > tokens * seconds(view, tokens - over, less, last.prompts, encoder)


def fit_chunk(request: RequestView, tokens: int) -> int:
    """Return the largest next chunk of a prompt, of at most `tokens`, that cuts nothing; 0 where there is none."""
    return request.rules.fit(request.done_tokens, request.whole_tokens, tokens)


def least_chunk(request: RequestView) -> int:
    """Return the smallest next chunk of a prompt that cuts nothing, tokens."""
    return request.rules.least(request.done_tokens, request.whole_tokens)


class Uncut:
    """Ends a chunk where nothing is cut: not within an image, and at whole blocks of a hybrid model's state."""

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        last = last_chunk(candidate)
        if last is None or last.request.rules is ANYWHERE:
            return candidate.tokens, candidate.reason
        chunk = fit_chunk(last.request, last.tokens)
        if chunk == last.tokens:
            return candidate.tokens, candidate.reason
        return last.before + chunk, Reason.UNCUT
