"""Retreat: whether a chunk of the run that went wrong is taken back and repeated at a lower rate.

If the rate is to blame, the next try is lower, and is followed by another one as long as that helps. Otherwise the run
itself has changed, and goes on at the rate that it had. A chunk that was lost altogether has no level to compare with:
one that merely rises is better than it in any case, and the rate at which it was lost is not used again.

A lost chunk has to be repeated however little is known of it, and new data are better met at a lower rate, even if the
repeated chunk is no better (docs/explanation/what-lost.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autolrs_plugin.core.plans.watch import LOST, Chunk, Watch, summary


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A chunk that was taken back.

    Attributes:
        step: where it began.
        rate: what the run returns to if it was not the rate: the last one at which the chunk was not lost.
        chunk: what it came to; None if it was lost.
    """

    step: int
    rate: float
    chunk: Chunk | None


class Retreats:
    """The chunk that was taken back last, and what follows from it."""

    def __init__(self) -> None:
        self._last: TakenBack | None = None

    def before(self, step: int) -> TakenBack | None:
        """Return what was taken back of the chunk that begins at `step`."""
        return self._last if self._last is not None and self._last.step == step else None

    def suspects_rate(self, step: int, losses: Sequence[float], found: str, watch: Watch) -> bool:
        """Tell whether a chunk from `step` on that was `found` to be RISEN or LOST may have become so by its rate."""
        before = self.before(step)
        if found == LOST or before is None or before.chunk is None:
            return True
        chunk = summary(losses, step + len(losses))
        return chunk is not None and watch.clearly_below(chunk, before.chunk)

    def take_back(self, step: int, losses: Sequence[float], found: str, rate: float, lower: float) -> None:
        """Take note of a chunk at `rate` that is repeated at a `lower` one."""
        before = self.before(step)
        if found == LOST:
            self._last = TakenBack(step, lower, None)
        else:
            kept = rate if before is None else before.rate
            self._last = TakenBack(step, kept, summary(losses, step + len(losses)))

    def clear(self) -> None:
        """Forget it: the run went on."""
        self._last = None
