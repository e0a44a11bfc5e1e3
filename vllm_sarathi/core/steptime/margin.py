"""The factor on a prediction that covers the stated share of the gaps, from how far predictions were off.

The SLO is a share of the gaps between tokens (99%) to each request, and a request may see no other steps than
hybrid ones: so the margin is a quantile of the hybrid steps' residuals, and steps without prefill, which keep the
SLO by themselves, excuse none of them. Residuals outlive a change of the device. Those of the change itself do not: the
model knows it from then on, and a margin that covered it as well would count a neighbour's slowness twice.
"""

import math
from collections import deque
from statistics import NormalDist

from vllm_sarathi.core.types import StepShape

RATIOS_KEPT = 256
ALIKE_NEEDED = 24
CAUTION = 0.14
CAUTIOUS_STEPS = 48
YOUNG_CAUTION = 0.02
"""While residuals are few the curve is still being found: a caution that fades, and a small one that fades slowly."""

BIAS_STEPS = 128
LEAST_MARGIN = 1.008
"""The best fit is off by a little somewhere."""

MOST_RATIO = 2.5
"""A step that takes this multiple of what was predicted is not the chunk's doing, and no chunk would have kept it."""

PAUSE = 1.25
"""A residual beyond this multiple of what covers the others is that of a pause."""

MISSES_PLANNED = 0.1
"""The share of the misses that the SLO allows that is planned with; the rest is for what no step could tell, and one
late step is a late gap of all that decode (figures: docs/explanation/what-lost.md)."""

GUARD_GAIN = 0.02
GUARD_MISSES = 0.015
GUARD_RUN_STEPS = 16
MOST_GUARD = 1.5
MISS = 1.005
"""A hybrid step that outlasts the margin so soon after another raises it by the gain; each other step lowers it again,
by so little that the given share of misses balances (after adaptive conformal inference; Gibbs and Candes, 2021). The
residuals' quantile alone lags behind where they come in runs, as on a machine with neighbours."""

STALE_STEPS = 500.0
STALE_CAUTION = 0.15
"""Where no hybrid step was seen for some time, the next ones are planned with more caution, until some are."""

FRESH_STEPS = 8
"""The number of hybrid steps that end that caution."""

MANY = 48
"""The number of residuals whose largest says something of the tail: before, the curve is still being found."""

_NORMAL = NormalDist()


class Margin:
    """Learns the margin from the ratios of measured to predicted times.

    Args:
        attainment: the share of gaps between tokens that is to be kept.
    """

    def __init__(self, attainment: float = 0.99) -> None:
        self.attainment = attainment
        self._planned = 1.0 - MISSES_PLANNED * (1.0 - attainment)
        self._ratios: deque[tuple[float, float]] = deque(maxlen=RATIOS_KEPT)
        self._early: deque[tuple[float, float]] = deque(maxlen=ALIKE_NEEDED)
        self._alone: deque[float] = deque(maxlen=RATIOS_KEPT)
        self._guard = 1.0
        self._steps_since_miss = GUARD_RUN_STEPS
        self._stale_steps = 0.0
        self._covering = self._quantile_now()
        self._alone_margin = 1.0 + CAUTION
        self._new = False

    @property
    def factor(self) -> float:
        """The factor that covers all but the planned misses of the hybrid steps, from their latest residuals."""
        stale = min(1.0, self._stale_steps / STALE_STEPS)
        return self._covering * self._guard + STALE_CAUTION * stale

    @property
    def alone(self) -> float:
        """The factor that covers the stated share of steps of decodes alone."""
        return self._alone_margin

    def saw(self, shape: StepShape) -> None:
        """Note which kind of step this is."""
        if shape.sequences > shape.decodes > 0:
            self._stale_steps = max(0.0, self._stale_steps - STALE_STEPS / FRESH_STEPS)
        elif shape.decodes:
            self._stale_steps = min(STALE_STEPS, self._stale_steps + 1.0)

    def observe(self, shape: StepShape, predicted_s: float, ratio: float, familiar: bool) -> None:
        """Take in a residual.

        Args:
            shape: the step.
            predicted_s: what was predicted, seconds.
            ratio: the measured over the predicted time.
            familiar: whether steps of this kind had been seen often.
        """
        if ratio > MOST_RATIO or not shape.decodes:
            return
        if shape.sequences == shape.decodes:
            self._alone.append(ratio)
            return
        (self._ratios if familiar else self._early).append((predicted_s, ratio))
        self._note_miss(ratio > MISS * self.factor)
        self._new = True

    def renew(self) -> None:
        """Compute the quantiles anew from what has been taken in; it costs some ten microseconds."""
        if self._new:
            self._covering, self._new = self._quantile_now(), False
        if len(self._alone) >= CAUTIOUS_STEPS:
            ordered = sorted(self._alone)
            self._alone_margin = max(1.0, _upper(ordered, self.attainment))

    def changed(self, steps: int) -> None:
        """Note that the device has changed: early residuals are trusted no more.

        Args:
            steps: the number of the latest residuals that are those of the change itself, and are dropped.
        """
        self._early = deque(maxlen=0)
        for _ in range(min(steps, len(self._ratios))):
            self._ratios.pop()
        self._covering = self._quantile_now()

    def _note_miss(self, missed: bool) -> None:
        in_a_run = missed and self._steps_since_miss < GUARD_RUN_STEPS
        self._steps_since_miss = 0 if missed else self._steps_since_miss + 1
        step = 1.0 if in_a_run else -GUARD_MISSES
        self._guard = min(MOST_GUARD, max(1.0, self._guard + GUARD_GAIN * step))

    def _quantile_now(self) -> float:
        """Return the residuals' quantile; while residuals are few, at least a caution that fades."""
        seen = len(self._ratios) + len(self._early)
        caution = 1.0 + CAUTION * max(0.0, 1.0 - seen / CAUTIOUS_STEPS)
        caution = max(caution, LEAST_MARGIN + YOUNG_CAUTION * (1.0 - seen / RATIOS_KEPT))
        if seen < 2:
            return max(LEAST_MARGIN, caution)
        return min(MOST_RATIO, max(LEAST_MARGIN, self._covering_factor(), caution))

    def _covering_factor(self) -> float:
        """Return the residuals' quantile, without those of pauses as long as the SLO allows for these.

        A pause takes as long beside a small chunk as beside a large one, so that a wide margin hardly helps.
        """
        ordered = sorted(self._telling())
        seen = len(self._ratios)
        allowed = max(1, int((1 - self.attainment) * seen)) if seen >= CAUTIOUS_STEPS else 0
        if 0 < allowed < len(ordered) // 2:
            usual = PAUSE * _upper(ordered[:-allowed], self._planned)
            if 0 < sum(ratio > usual for _, ratio in self._ratios) <= allowed:
                ordered = [ratio for ratio in ordered if ratio <= usual]
        return _upper(ordered, self._planned)

    def _telling(self) -> list[float]:
        """Return the residuals of the longer steps, where there are enough: those that a margin is wanted for.

        What disturbs a step often takes the same time whatever the step, so short ones are off by more of theirs.
        """
        kept = list(self._ratios)
        if len(kept) < ALIKE_NEEDED:
            kept += self._early
        longest_s = sorted(predicted_s for predicted_s, _ in kept)[-1 - len(kept) // 8]
        longer = [ratio for predicted_s, ratio in kept if predicted_s >= 0.5 * longest_s]
        return longer if len(longer) >= ALIKE_NEEDED else [ratio for _, ratio in kept]


def _upper(ordered: list[float], quantile: float) -> float:
    """Return the quantile of sorted ratios, the larger of two estimates.

    A normal distribution's, from the mean deviation, is steadier than the few largest of a sample; where the
    residuals' own tail is heavier, a quantile somewhat below the wanted one shows it. It is lighter where the device is
    in one of two states, or the curve off to either side: then what the largest would be in a normal sample says so.
    """
    count = len(ordered)
    centre, tail = (ordered[int(q * (count - 1))] for q in (0.5, 1 - 3 * (1 - quantile)))
    deviation = sum([abs(ratio - centre) for ratio in ordered]) / count
    # Few steps that were quicker than predicted do not say that the next ones will be.
    centre = max(centre, 1.0 - (1.0 - centre) * min(1.0, count / BIAS_STEPS))
    normal = centre + _NORMAL.inv_cdf(quantile) * math.sqrt(math.pi / 2) * deviation
    if count >= MANY:
        reach = _NORMAL.inv_cdf(quantile) / _NORMAL.inv_cdf(1 - 1 / count)
        normal = min(normal, centre + max(1.0, reach) * max(0.0, ordered[-1] - centre))
    return max(tail, normal)
