"""One stage's probes: what each does, and what it says of its rate.

Every probe of a stage starts from the same weights and sees the same minibatches. It goes from the present rate to
its own, stays there, and cools down to zero over its last part, so that what is compared is what the rates have
gained, not how much noise they stir. The first probe is that of the present rate: the reference.

    L     a probe's loss: the mean training loss of its last steps. Where validation losses were evaluated, they are
          first put on the scale of the training losses of the stage (they may be perplexities, percents or sums),
          and L is the mean of both.
    gain  the loss before the stage minus L.
    std   of the difference of two probes' L: the standard error of the difference step by step on the same
          minibatches, and SAME_RATE of the largest gain, by which two probes of one rate differ as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.core.plans.training import diverged_above
from autolrs_plugin.core.posterior import Array, Seen
from autolrs_plugin.core.state import Candidate

RAMP = 0.25
"""Share of a probe in which its rate leaves the present one."""

COOL = 0.4
"""Share of a probe in which its rate falls to zero."""

TAIL = 0.3
"""Share of a probe's steps whose training losses are its loss."""

LEAST_TAIL = 3
PLATEAU_Z = 2.0
"""A gain below this number of standard deviations of a few minibatches' losses is none."""

SAME_RATE = 0.05
COLD = 10.0
"""From the first weights, a probe begins at its rate divided by this."""

HOPELESS_Z = 4.0
"""A probe ends early on a loss this number of standard deviations above the greatest one of the reference; and two that
end no further apart end alike."""


def probe_rates(rate: float, present: float | None, steps: int) -> tuple[float, ...]:
    """Return the learning rate of each step of a probe; `present` is None at the first weights."""
    rise, cool = max(1, round(RAMP * steps)), max(1, round(COOL * steps))
    start = rate / COLD if present is None else present
    rates = []
    for t in range(steps):
        away = min(1.0, (t + 1) / (rise + 1))
        rates.append(start * (rate / start) ** away * min(1.0, (steps - t) / (cool + 1)))
    return tuple(rates)


@dataclass(frozen=True, slots=True)
class Tried:
    """A probe that was taken: the rate it stands for, and what came of it."""

    lr: float
    probe: Probe
    result: Result
    held: bool

    @property
    def losses(self) -> tuple[float, ...]:
        """Its losses; in the place of one that is not finite, and is followed by one that is, the one beside it."""
        values = self.result.losses
        return tuple(
            (values[i - 1] if i else after) if not math.isfinite(loss) and math.isfinite(after) else loss
            for i, (loss, after) in enumerate(zip(values, (*values[1:], math.nan), strict=True))
        )

    @property
    def whole(self) -> bool:
        """Whether it was taken to its end, and what it came to is finite."""
        last = 0.0 if self.result.val_loss is None else self.result.val_loss
        return len(self.losses) == len(self.probe.lrs) and all(map(math.isfinite, (*self.losses, last)))

    @property
    def scatter(self) -> float:
        """The standard deviation of its losses around their course."""
        losses = self.losses
        return float(np.std(np.diff(losses))) / math.sqrt(2) if len(losses) > 2 else 0.0

    @property
    def tail(self) -> Array:
        """The training losses that are its loss."""
        count = max(LEAST_TAIL, round(TAIL * len(self.probe.lrs)))
        return np.array(self.losses[-count:])


def tried(lr: float, probe: Probe, result: Result, above: float, sign: float) -> Tried:
    """Return a probe with its result; `sign` is -1 where a greater validation value is better."""
    if result.val_loss is not None:
        result = replace(result, val_loss=sign * result.val_loss)
    attempt = Tried(lr, probe, result, held=False)
    if not attempt.whole:
        return attempt
    if not math.isfinite(above):
        above = diverged_above(attempt.losses[0])
    return replace(attempt, held=float(np.median(attempt.losses[-3:])) <= above)


def ends_alike(one: Tried, lower: Tried) -> bool:
    """Tell whether a probe ends where one at a far lower rate does, by that one's scatter: then no rate is too high.

    The first loss is no scale where losses scatter, or lie near zero, or where the run has changed.
    """
    if not (one.whole and lower.whole):
        return False
    error = lower.scatter * math.sqrt(1 / len(one.tail) + 1 / len(lower.tail))
    return abs(float(one.tail.mean() - lower.tail.mean())) <= HOPELESS_Z * error


def no_fault_of_the_rate(attempt: Tried, reference: Tried | None) -> bool:
    """Tell whether a probe ended on a loss that is not finite and that its learning rate has not brought about.

    The first loss is that of the weights before the first step; and a rate that is too high shows in a loss that is
    too high before it shows in one that is not finite: by the scatter of the reference, or twice the first one.
    """
    losses = attempt.result.losses
    if math.isfinite(losses[-1]):
        return False
    before = [loss for loss in losses[:-1] if math.isfinite(loss)]
    if not before:
        return True
    holds = reference is not None and reference.held
    return before[-1] <= (hopeless_above(reference, math.inf) if holds else diverged_above(before[0]))


def hopeless_above(reference: Tried | None, above: float) -> float:
    """Return the training loss on which a probe is ended early."""
    if reference is None or not reference.held:
        return above
    top = max(reference.losses)
    return min(above, top + max(HOPELESS_Z * reference.scatter, 0.02 * abs(top)))


def losses_of(probes: Sequence[Tried]) -> Array:
    """Return L of each probe, shape [n]; all must have held."""
    tails = np.array([float(p.tail.mean()) for p in probes])
    values = [p.result.val_loss for p in probes]
    if any(v is None for v in values) or len(probes) < 2:
        return tails
    judged = np.array(values, dtype=float)
    spread = float(np.std(judged))
    if not spread > 0:
        return tails
    # Ranks, distances and the middle of the validation losses, in the unit of the training losses.
    scaled: Array = (judged - judged.mean()) * (float(np.std(tails)) / spread) + tails.mean()
    return (tails + scaled) / 2


def difference_std(one: Tried, other: Tried) -> float:
    """Return the standard error of the difference of two probes' losses."""
    a, b = one.tail, other.tail
    if one.probe.draw == other.probe.draw and len(a) == len(b):
        return float(np.std(a - b, ddof=1)) / math.sqrt(len(a))
    return math.hypot(
        float(np.std(a, ddof=1)) / math.sqrt(len(a)), float(np.std(b, ddof=1)) / math.sqrt(len(b))
    )


def shortfalls(probes: Sequence[Tried], before: float, progress: float, extra_std: float) -> list[Seen]:
    """Return what the probes that held say, in the notation of `posterior`.

    Args:
        probes: those that held.
        before: the training loss before the stage.
        progress: of the run.
        extra_std: standard deviation for what such short probes cannot know.
    """
    if not probes:
        return []
    losses = losses_of(probes)
    best = int(np.argmin(losses))
    noise = [difference_std(p, probes[best]) if i != best else 0.0 for i, p in enumerate(probes)]
    # Where nothing has been gained beyond the noise, differences are measured in noise, and decide nothing.
    unsure = PLATEAU_Z * probes[0].scatter * math.sqrt(0.5 + 1 / len(probes[0].tail))
    unit = max(before - float(losses[best]), unsure, *noise, 1e-12 * max(1.0, abs(before)))
    return [
        Seen(
            math.log10(p.lr),
            progress,
            float(loss - losses[best]) / unit,
            math.hypot(noise[i] / unit, SAME_RATE, extra_std),
        )
        for i, (p, loss) in enumerate(zip(probes, losses, strict=True))
    ]


def candidates_of(probes: Sequence[Tried]) -> tuple[Candidate, ...]:
    """Return the probes as they are booked, with the loss and standard deviation that decided."""
    held = [p for p in probes if p.held]
    losses = dict(zip(map(id, held), losses_of(held), strict=True)) if held else {}
    booked = []
    for p in probes:
        taken = len(p.result.losses)
        std = max((difference_std(p, q) for q in held if q is not p), default=0.0) if p.held else 0.0
        booked.append(
            Candidate(
                p.lr,
                p.probe.lrs[:taken],
                p.result.losses,
                p.result.val_loss,
                float(losses.get(id(p), math.inf)),
                std,
            )
        )
    return tuple(booked)
