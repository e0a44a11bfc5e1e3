"""Climb: where a run that has gained something is stuck, its rate rises from chunk to chunk; and comes back.

Where nothing was ever gained, the plan climbs at once (`staged`). A run that has gained may just have learnt what there
is, so a climb from a plateau after a gain asks for more:

    stuck    a line through the last chunks leads to little (`Watch.stuck`), and the loss is no small part of the first
    probes   a stage since the plateau began; none of its probes gains anything beyond noise
    early    there is time to come back from it

It goes up to FAR times the rate, or to below one that exploded, and waits there. It ends where a chunk lies clearly
below all those before: a stage opens. Where a chunk is taken back, or nothing is gained before LATE, the rate is what
it was, for good.
"""

import math
from statistics import fmean

from autolrs_plugin.core.plans.watch import Chunk, Watch
from autolrs_plugin.core.state import RunState

CLIMB = 1.5
"""Where a tenth of the run and more has gained nothing, each chunk has this multiple of the rate of the one before."""

FAR = 16.0
EARLY, LATE = 0.6, 0.7
"""Progress after which no climb begins, and at which it ends."""

NO_GAIN_Z = 2.0
TAIL = 0.3
"""The share of a probe that is its loss (`probing`)."""


class Climb:
    """A climb from a plateau after a gain.

    Attributes:
        start: the rate that it began with; None while there is none.
        in_vain: whether one has gained nothing.
    """

    def __init__(self) -> None:
        self.start: float | None = None
        self._best: Chunk | None = None
        self._top = self._ceiling = math.inf
        self.in_vain = False

    def due(self, state: RunState, watch: Watch) -> bool:
        """Whether a climb may begin, if probes show nothing."""
        early = state.step <= EARLY * state.config.max_steps
        return early and not self.in_vain and watch.stuck(state.config.max_steps - state.step)

    def begin(self, state: RunState, rate: float, ceiling: float, watch: Watch) -> float:
        """Begin a climb, and return the rate of the next chunk."""
        self.start, self._best = rate, watch.best
        self._top, self._ceiling = min(FAR * rate, ceiling / CLIMB), ceiling
        return self.next_rate(state, rate, ceiling, watch)

    def next_rate(self, state: RunState, rate: float, ceiling: float, watch: Watch) -> float:
        """Return the rate of the next chunk; where the climb was of no use, it is the one that it began with."""
        assert self.start is not None
        if watch.chunks and self._best and watch.clearly_below(watch.chunks[-1], self._best):
            self.end()
            return rate
        taken_back = ceiling < self._ceiling
        if self._top > self.start and not taken_back and state.step < LATE * state.config.max_steps:
            return min(rate * CLIMB, self._top)
        back_to, self.in_vain = self.start, True
        self.end()
        return back_to

    def end(self) -> None:
        """Leave it: something was gained, or the rate is another one."""
        self.start = self._best = None


def probes_gain(state: RunState, watch: Watch) -> bool | None:
    """Whether the last stage's probes gained anything beyond noise; None if there was none on this plateau."""
    stage, recent = state.stages[-1], watch.plateau
    length = max((len(c.losses) for c in stage.candidates), default=0)
    before = [loss for loss in state.losses[: stage.first_step][-length:] if math.isfinite(loss)]
    if not recent or not length or not before or stage.first_step < recent[0].begin:
        return None
    lowest = min(c.forecast for c in stage.candidates)
    error = watch.scatter * math.sqrt(1 / max(1.0, TAIL * length) + 1 / len(before))
    return fmean(before) - lowest > NO_GAIN_Z * error
