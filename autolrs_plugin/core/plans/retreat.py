"""Retreat: whether a chunk of the run that went wrong is taken back and repeated at a lower rate.

If the rate is to blame, the next try is lower, and is followed by another one as long as that helps. Otherwise the run
itself has changed, and goes on at the rate that it had. After a chunk that was lost, one that merely rises is better in
any case, and the rate at which it was lost is not used again. One that is lost as well, but no lower, and that does not
grow, is no explosion: these are other data, and another scale.

A lost chunk has to be repeated however little is known of it, and new data are better met at a lower rate, even if the
repeated chunk is no better (docs/explanation/what-lost.md). Where there is no way back, the next chunk is that try.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autolrs_plugin.core.plans.watch import LOST, Chunk, Watch, summary


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A chunk that was taken back, or was lost and stays.

    Attributes:
        step: where the lower try begins.
        rate: what the run returns to if it was not the rate: the last one at which the chunk was not lost.
        chunk: what it came to; None if no loss was finite.
        lost_at: the rate at which it was lost, if it was.
        stays: whether it could not be taken back.
    """

    step: int
    rate: float
    chunk: Chunk | None
    lost_at: float | None = None
    stays: bool = False

    def back_to(self, found: str) -> float:
        """Return the rate of a run that has changed; `found` is what the lower try is."""
        return self.lost_at if found == LOST and self.lost_at is not None else self.rate


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
        if before is None or (found == LOST and watch.grows(losses)):
            return True
        if before.stays:
            return found != LOST
        if before.chunk is None or (before.lost_at is not None and found != LOST):
            return True
        chunk = summary(losses, step + len(losses))
        return chunk is not None and watch.clearly_below(chunk, before.chunk)

    def take_back(self, step: int, losses: Sequence[float], found: str, rate: float, lower: float) -> None:
        """Take note of a chunk at `rate` that is repeated at a `lower` one."""
        before, chunk = self.before(step), summary(losses, step + len(losses))
        if found == LOST:
            self._last = TakenBack(step, lower, chunk, lost_at=rate)
        else:
            self._last = TakenBack(step, rate if before is None else before.rate, chunk)

    def stay(self, step: int, lower: float) -> None:
        """Take note of a lost chunk up to `step` that stays; the run goes on at a `lower` rate."""
        self._last = TakenBack(step, lower, None, stays=True)

    def clear(self) -> None:
        """Forget it: the run went on."""
        self._last = None
