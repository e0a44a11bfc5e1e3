"""Watch: forecast against reality, chunk by chunk of the run's own steps.

    level     the mean of a chunk's finite losses in its second half
    scatter   the standard deviation of a chunk's losses around a line
    outlier   a loss that lies more than OUTLIER_Z scatters from the median of those around it, where they return

Losses scatter with heavy tails in some runs: level and scatter leave outliers out. One or two high losses at the end
of a chunk may be outliers, or the beginning of a rise: that is seen in the next chunk, and until then there is a way
back to before both. A loss from which a run came back by itself was no explosion.

A chunk has gone wrong if its losses end not finite, or explode, or if its level lies above the lowest one before by
more than RISE_Z standard errors and more than RISE_SHARE of what has been gained so far. The scatter of a few losses
is small by chance, and one loss has none: how much losses scatter is learnt from the chunks before. A chunk stalls if
it lies above the forecast by as much: a line through the last levels over the logarithm of the step, with its own
standard error. It fell if it lies below the forecast by FALL_SHARE of what has been gained: a plateau has ended, or
layers have been unfrozen, and what was found out before may not hold any more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, linear_regression, median, median_low

from scipy.special import ndtr, stdtrit

from autolrs_plugin.core.plans.training import diverged_above

EXPLODED_SCATTERS = 5.0
RISE_Z = 4.0
RISE_SHARE = 0.1
STALL_SHARE = 0.1
FALL_SHARE = 0.3
FLAT_SCATTERS = 5.0
STUCK_SHARE, LEFT_SHARE = 0.2, 0.1
LOST_SHARE = 0.5
"""Of all that had been gained: a new rate that loses more than this again is too high."""

OUTLIER_Z, AROUND = 5.0, 2
"""How far an outlier lies from the median of the AROUND losses before and after it and itself."""

ABSOLUTE = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations."""

CALM_SHARE = 0.05
FORECAST_CHUNKS = 8
LEAST_CHUNKS = 4
"""The number of chunks that make a forecast."""

FINE, RISEN, STALLED, FELL, LOST = "fine", "risen", "stalled", "fell", "lost"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that was trained: where it ended, its level, of how many losses that is the mean, and its scatter."""

    end: int
    level: float
    count: int
    scatter: float

    @property
    def begin(self) -> int:
        """About where it began: its level is that of its second half."""
        return self.end - 2 * self.count

    @property
    def error(self) -> float:
        """The standard error of the level."""
        return self.scatter / math.sqrt(self.count)

    def clearly_below(self, other: "Chunk") -> bool:
        """Whether its level is lower than another's by more than noise."""
        return other.level - self.level > RISE_Z * math.hypot(self.error, other.error)


def summary(losses: Sequence[float], end: int, usual: float = 0.0) -> Chunk | None:
    """Return a chunk's summary; None where no loss is finite. `usual` is the scatter seen so far."""
    values = without_outliers([loss for loss in losses if math.isfinite(loss)], usual)
    if not values:
        return None
    half = values[len(values) // 2 :]
    steps = [after - before for before, after in pairwise(values)]
    # The scatter of a difference of two losses is larger than that of one.
    scatter = _std(steps) / math.sqrt(2) if len(values) > 2 else _std(values)
    return Chunk(end, fmean(half), len(half), scatter)


def without_outliers(values: Sequence[float], usual: float = 0.0) -> list[float]:
    """Return losses with the median of those around it in the place of each outlier (Hampel's filter).

    Losses that swing hold none: they differ from each other as a rule. One or two at the very end are taken for some.
    """
    if len(values) <= 2 * AROUND:
        return list(values)
    apart = median(abs(after - before) for before, after in pairwise(values))
    most = OUTLIER_Z * (usual or ABSOLUTE * apart / math.sqrt(2))
    last = len(values) - 2 * AROUND - 1
    starts = (min(max(0, i - AROUND), last) for i in range(len(values)))
    middles = (median(values[start : start + 2 * AROUND + 1]) for start in starts)
    return [m if abs(value - m) > most else value for value, m in zip(values, middles, strict=True)]


def _std(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _tail(losses: Sequence[float]) -> Sequence[float]:
    """Return the last quarter of a chunk's finite losses, three at least where there are as many."""
    values = [loss for loss in losses if math.isfinite(loss)]
    return values[-max(3, len(values) // 4) :]


def _expected_fall(chunks: Sequence[Chunk], left_steps: int) -> float:
    """Return how far a line through the levels of chunks comes down, as steep as its standard error allows."""
    ends = [float(c.end) for c in chunks]
    slope, _ = linear_regression(ends, [c.level for c in chunks])
    unsure = median(c.error for c in chunks) / (_std(ends) * math.sqrt(len(ends)))
    return (2 * unsure - slope) * left_steps


@dataclass
class Watch:
    """Compares each chunk with those before it.

    Attributes:
        first_loss: the training loss before the first step, in its usual scatter.
        above: a loss above this has exploded.
        chunks: those that were fine, since the run changed.
        recent: the last chunks of three losses and more, at whatever rate: what noise is, is learnt from them.
        lowest: the lowest level since the run changed, at whatever rate.
        returned: the highest loss from which the run came back within a chunk.
        unsettled: whether the last chunk ended high, and the next one will tell.
    """

    first_loss: float = math.nan
    above: float = math.inf
    chunks: list[Chunk] = field(default_factory=list)
    recent: list[Chunk] = field(default_factory=list)
    lowest: float = math.inf
    returned: float = -math.inf
    unsettled: bool = False

    def judge(self, losses: Sequence[float], end: int) -> str:
        """Return what a chunk of losses up to the real step `end` is: FINE, RISEN, STALLED, FELL or LOST."""
        chunk = self.summary(losses, end)
        if chunk is None or not any(map(math.isfinite, losses[-max(1, len(losses) // 4) :])):
            return LOST
        if median_low(_tail(losses)) > self._lost_above:
            return LOST
        if chunk.count == 1 and not self.recent:
            return FINE  # one or two losses do not tell how they scatter
        if not self.chunks:
            # The first chunk at a rate: levels may rise for a while, but not lose most of what was gained.
            lost = chunk.level - self.first_loss + (1 - LOST_SHARE) * max(0.0, self.first_loss - self.lowest)
            return RISEN if lost > self._rise_z(chunk) * self._calm(chunk).error else FINE
        best = min(self.chunks, key=lambda c: c.level)
        gained = max(0.0, self.first_loss - best.level)
        own = self._calm(chunk).error
        error = math.hypot(own, self._calm(best).error)
        z = self._rise_z(chunk)
        if chunk.level - best.level > max(z * error, RISE_SHARE * gained):
            return RISEN
        predicted, std = self.forecast(end)
        missed = chunk.level - predicted
        if missed > z * math.hypot(std, own) and missed > STALL_SHARE * gained:
            return STALLED
        if -missed > z * math.hypot(std, own) and -missed > FALL_SHARE * gained:
            return FELL
        return FINE

    def summary(self, losses: Sequence[float], end: int) -> Chunk | None:
        """Return a chunk's summary, with outliers left out by the scatter seen so far."""
        return summary(losses, end, self._usual)

    @property
    def _usual(self) -> float:
        return median([c.scatter for c in self.recent] or [0.0])

    @property
    def best(self) -> Chunk | None:
        """The lowest chunk of those that were fine."""
        return min(self.chunks, key=lambda c: c.level, default=None)

    @property
    def _lost_above(self) -> float:
        return max(self.above, self.returned)

    def _calm(self, chunk: Chunk) -> Chunk:
        """Return a chunk with a scatter that is within the usual one and twice that.

        One that scatters far more must not hide behind that, and the scatter of few losses is small by chance: it
        would take noise for a rise.
        """
        if not self.recent:
            return chunk
        usual = self._usual
        return replace(chunk, scatter=min(max(chunk.scatter, usual), 2 * usual))

    def _rise_z(self, chunk: Chunk) -> float:
        """Return what RISE_Z comes to in Student's distribution as long as few losses have told how much they scatter.

        The scatter comes from differences of successive losses, which tell two thirds of what that number of
        independent ones would (von Neumann, 1941); a level is the mean of half of a chunk's losses.
        """
        if len(self.recent) >= LEAST_CHUNKS:
            return RISE_Z
        known = self.recent or [chunk]
        return float(stdtrit(4 / 3 * sum(c.count for c in known), ndtr(RISE_Z)))

    def clearly_below(self, chunk: Chunk, other: Chunk) -> bool:
        """Whether a chunk's level is lower than another's by more than noise."""
        return self._calm(chunk).clearly_below(self._calm(other))

    def take(self, losses: Sequence[float], end: int) -> None:
        """Take in a chunk that is kept."""
        chunk = self.summary(losses, end)
        if chunk is not None:
            self._take_ending(losses)
            if not math.isfinite(self.first_loss):
                self.first_loss = next(loss for loss in losses if math.isfinite(loss))
            self.chunks.append(chunk)
            self.lowest = min(self.lowest, chunk.level)
            if chunk.count > 1:
                self.recent = [*self.recent, chunk][-FORECAST_CHUNKS:]

    def _take_ending(self, losses: Sequence[float]) -> None:
        """Take note of whether a chunk that is kept ends high, and of what it came back from."""
        values = [loss for loss in losses if math.isfinite(loss)]
        tail = _tail(values)
        clean = without_outliers(values, self._usual)
        ends_high = any(loss > c for loss, c in zip(values[-AROUND:], clean[-AROUND:], strict=True))
        self.unsettled = ends_high or values[-1] > self._lost_above
        if median_low(tail) <= self._lost_above:
            self.returned = max([self.returned, *values[: -len(tail)]])

    def back_to(self, step: int) -> None:
        """Forget what was taken in of the run after a step that it was taken back to."""
        self.chunks = [c for c in self.chunks if c.end <= step]
        self.recent = [c for c in self.recent if c.end <= step]
        self.unsettled = False

    @property
    def gained(self) -> bool:
        """Whether the lowest level lies below the first level, or the first loss, by more than noise."""
        if len(self.chunks) < 2:
            return False
        first, last = self.chunks[0], min(self.chunks[1:], key=lambda c: c.level)
        scatter = median(c.scatter for c in self.chunks)
        return last.clearly_below(first) or self.first_loss - last.level > RISE_Z * scatter

    @property
    def has_gained(self) -> bool:
        """Whether the run has come below its first loss, at whatever rates, by more than noise."""
        scatter = median([c.scatter for c in self.recent] or [math.inf])
        return self.first_loss - self.lowest > RISE_Z * scatter

    def flat(self, left_steps: int) -> bool:
        """Whether nothing has been gained over all chunks, four at least, nor before, nor is much to be expected.

        That is, the first loss, the first level and the lowest one differ by noise alone, and a line through the
        levels, as steep as its standard error allows, comes down by less than FLAT_SCATTERS in the steps that are
        left. The last keeps noise from being taken for a plateau. Where losses scatter by more than CALM_SHARE of
        their level, noise hides what is gained, and a rise until it is too late: that is no plateau either.
        """
        if len(self.chunks) < LEAST_CHUNKS or self.gained:
            return False
        if self.scatter > CALM_SHARE * abs(median(c.level for c in self.chunks)):
            return False
        return _expected_fall(self.chunks, left_steps) <= FLAT_SCATTERS * self.scatter

    @property
    def scatter(self) -> float:
        """The scatter of a loss, over all chunks."""
        return median([c.scatter for c in self.chunks] or [0.0])

    @property
    def plateau(self) -> list[Chunk]:
        """The last chunks, which `stuck` looks at; none if they are too few."""
        return self.chunks[-FORECAST_CHUNKS:] if len(self.chunks) >= LEAST_CHUNKS else []

    def stuck(self, left_steps: int) -> bool:
        """Whether the last chunks gain nothing, though something had been gained before, and much is left.

        That is, a line through their levels, as steep as its standard error allows, comes down by less than
        STUCK_SHARE of what has been gained in the steps that are left. A run that has come below LEFT_SHARE of its
        first loss has learnt. Where the noise of a level is more than CALM_SHARE of it, a rise would be seen too late.
        """
        recent, gained = self.plateau, self.first_loss - self.lowest
        if not recent or not self.has_gained:
            return False
        level = median(c.level for c in recent)
        if median(c.error for c in recent) > CALM_SHARE * abs(level) or level < LEFT_SHARE * self.first_loss:
            return False
        return _expected_fall(recent, left_steps) <= STUCK_SHARE * gained

    def forget(self) -> None:
        """Forget the chunks before: at another rate losses may rise for a while."""
        self.chunks.clear()

    def begin_anew(self, losses: Sequence[float]) -> None:
        """Measure gains from these losses on, and explosions too: the run is another one."""
        changed = self.summary(losses, 0)
        self.forget()
        self.recent.clear()
        self.lowest = math.inf
        if changed is not None:
            above = self.above
            self.set_scale(changed.level, changed.scatter)
            self.above = max(above, self.above)

    def learn_scale(self, first: Sequence[float], held: Sequence[float]) -> None:
        """Take note of the scale of a run: of the first losses of its probes, and all losses of those that held."""
        firsts = [loss for loss in first if math.isfinite(loss)]
        if firsts:
            self.set_scale(median(firsts), _std(held or [0.0]))

    def set_scale(self, first_loss: float, scatter: float) -> None:
        """Take note of the loss that gains are measured from, and of the one above which the run has exploded."""
        self.first_loss = first_loss
        self.above = max(diverged_above(first_loss), first_loss + EXPLODED_SCATTERS * scatter)

    def grows(self, losses: Sequence[float]) -> bool:
        """Whether a LOST chunk ends not finite, or has doubled since it came so high; other data do not do so."""
        tail = losses[-max(1, len(losses) // 4) :]
        high = [loss for loss in losses if loss > self._lost_above]
        if not high or not all(map(math.isfinite, tail)):
            return True
        # One outlier among the last losses is no growth.
        return median_low(_tail(losses)) > self._lost_above and fmean(tail) > diverged_above(high[0])

    def forecast(self, end: int) -> tuple[float, float]:
        """Return the level forecast at a step, and its standard deviation; infinite where too little is known."""
        recent = self.chunks[-FORECAST_CHUNKS:]
        if len(recent) < LEAST_CHUNKS:
            return math.inf, math.inf
        t = [math.log(c.end) for c in recent]
        slope, intercept = linear_regression(t, [c.level for c in recent])
        squares = sum((c.level - slope * at - intercept) ** 2 for c, at in zip(recent, t, strict=True))
        noise = math.sqrt(squares / (len(recent) - 2))
        away = (math.log(end) - fmean(t)) ** 2 / max(1e-12, len(t) * _std(t) ** 2)
        return slope * math.log(end) + intercept, noise * math.sqrt(1 + 1 / len(recent) + away)
