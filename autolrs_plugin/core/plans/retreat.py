"""Retreat: whether a chunk of the run that went wrong is taken back and repeated at a lower rate.

If the rate is to blame, the next try is lower, and is followed by another one as long as that helps. Otherwise the run
itself has changed, and goes on at the rate that it had. After a chunk that was lost, one that merely rises is better in
any case, and the rate at which it was lost is not used again. One that is lost as well, but no lower, and that does not
grow, is no explosion: these are other data, and another scale.

A lost chunk has to be repeated however little is known of it, and new data are better met at a lower rate, even if the
repeated chunk is no better (docs/explanation/what-lost.md). Where there is no way back, the next chunk is that try. But
a run that is soon as low again as it was has met noise, and has its rate back; so has one that was no lower at the
lower rate, where more than a chunk was repeated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autolrs_plugin.core.plans.watch import LOST, Chunk, Watch
from autolrs_plugin.core.state import RunState

ALIKE = 0.9
"""Of the height of the highest loss above the lowest one: what is left of a minibatch's own at a lower rate, at least;
an explosion is lower."""

WAIT_CHUNKS = 4
"""A run that is as low as before within this number of chunks has met noise."""


@dataclass(frozen=True, slots=True)
class TakenBack:
    """A chunk that was taken back, or was lost and stays.

    Attributes:
        step: where the lower try begins.
        losses: those that were taken back.
        rate: what the run returns to if it was not the rate: the last one at which the chunk was not lost.
        chunk: what it came to; None if no loss was finite.
        lost_at: the rate at which it was lost, if it was.
        stays: whether it could not be taken back.
    """

    step: int
    rate: float
    chunk: Chunk | None
    losses: tuple[float, ...] = ()
    lost_at: float | None = None
    stays: bool = False

    def back_to(self, found: str) -> float:
        """Return the rate of a run that has changed; `found` is what the lower try is."""
        return self.lost_at if found == LOST and self.lost_at is not None else self.rate

    def height_of(self, losses: Sequence[float]) -> float:
        """Return the height of the highest loss at the lower rate, as a share of that before; 0 if not finite."""
        if not self.losses or not all(map(math.isfinite, (*losses, *self.losses))):
            return 0.0
        least = min(*losses, *self.losses)
        return (max(losses) - least) / max(max(self.losses) - least, 1e-12)

    def same_peak(self, losses: Sequence[float]) -> bool:
        """Whether losses at the lower rate are highest at the same step, and about as high."""
        at = max(range(len(losses)), key=losses.__getitem__)
        same = self.losses.index(max(self.losses)) == at if self.losses else False
        return same and self.height_of(losses) >= ALIKE


class Retreats:
    """The chunk that was taken back last, and what follows from it."""

    def __init__(self, chunk_steps: int) -> None:
        self._chunk_steps = chunk_steps
        self._last: TakenBack | None = None
        self._waiting: tuple[int, float, Chunk] | None = None

    def before(self, step: int) -> TakenBack | None:
        """Return what was taken back of the chunk that begins at `step`."""
        return self._last if self._last is not None and self._last.step == step else None

    def steps(self, step: int, found: str) -> int:
        """Return by how many powers a chunk from `step` on, `found` to be bad, is to be repeated at a lower rate."""
        before = self.before(step)
        return 2 if found == LOST and before is not None and before.lost_at is not None else 1

    def suspects_rate(self, step: int, losses: Sequence[float], found: str, watch: Watch) -> bool:
        """Tell whether a chunk from `step` on that was `found` to be RISEN or LOST may have become so by its rate."""
        before = self.before(step)
        if before is None:
            return True
        if found == LOST and before.same_peak(losses):
            return False
        if found == LOST and (watch.grows(losses) or 0 < before.height_of(losses) < ALIKE):
            return True
        if before.stays:
            return found != LOST
        if before.chunk is None or (before.lost_at is not None and found != LOST):
            return True
        chunk = watch.summary(losses, step + len(losses))
        return chunk is not None and watch.clearly_below(chunk, before.chunk)

    def take_back(
        self, step: int, losses: tuple[float, ...], found: str, rate: float, lower: float, watch: Watch
    ) -> None:
        """Take note of losses at `rate`, a chunk's and those before it, that are repeated at a `lower` one."""
        before, chunk = self.before(step), watch.summary(losses, step + len(losses))
        if found == LOST:
            self._last = TakenBack(step, lower, chunk, losses, lost_at=rate)
        else:
            self._last = TakenBack(step, rate if before is None else before.rate, chunk, losses)

    def stay(self, step: int, lower: float) -> None:
        """Take note of a lost chunk up to `step` that stays; the run goes on at a `lower` rate."""
        self._last = TakenBack(step, lower, None, stays=True)

    def wait(self, step: int, rate: float, watch: Watch) -> None:
        """Take note of what the run returns to if it is as low as before the rise within a few chunks from `step`."""
        if watch.best is not None:
            self._waiting = step + WAIT_CHUNKS * self._chunk_steps, rate, watch.best

    def noise_at(self, step: int, losses: Sequence[float], watch: Watch) -> float | None:
        """Return the rate to go back to, where a chunk from `step` on that is fine shows that noise had lowered it."""
        before, chunk = self.before(step), watch.summary(losses, step + len(losses))
        if chunk is None:
            return None
        if before is not None and before.chunk is not None and before.lost_at is None:
            longer = len(losses) == len(before.losses) > self._chunk_steps
            return before.rate if longer and not watch.clearly_below(chunk, before.chunk) else None
        if self._waiting is not None and step < self._waiting[0]:
            _, rate, best = self._waiting
            if not watch.clearly_below(best, chunk):
                self._waiting = None
                return rate
        return None

    def gone_on(self) -> None:
        """Forget what was taken back: the run went on."""
        self._last = None

    def clear(self) -> None:
        """Forget all: the run goes on at another rate."""
        self._last = self._waiting = None


def ends_badly(state: RunState, watch: Watch, chunk_steps: int) -> bool:
    """Whether the run's last chunk may have been the beginning of what goes wrong: then it is not gone back to."""
    if not state.losses:
        return False
    since = state.step - (state.kept_step or 0)
    two = since <= chunk_steps and state.budget_left_steps >= 2 * chunk_steps
    return (watch.unsettled and two) or not math.isfinite(state.losses[-1])
