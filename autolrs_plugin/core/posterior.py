"""Posterior: what the probes of all stages say of the learning rate now, and the evidence test.

Notation (Rasmussen and Williams 2006, chapter 2): x is log10 of a learning rate, p the progress of the run in [0, 1],
y the shortfall of a probe: how much less it gained than the best probe of its stage, as a share of that gain. A
Gaussian process over (x, p) with a Matern-5/2 kernel, and each probe's own variance as noise, has the posterior mean
mu(x) and covariance at the present p. Shortfalls have no unit, so stages can be compared, and so can a loss f and
3 f + 7. Far from the present rate the prior mean of y rises: nothing is known there, and little is hoped for.

A probe that diverged is a ceiling: nothing at or above it is asked or decided for; and it is told as the least that
is true of it, that it gained nothing, with much doubt (LOST in `stage_search`).

THE EVIDENCE TEST. The present rate is left for another one only if, with d = mu(present) - mu(other),

    d > clearly * std(d)   and   d > margin,        (clearly, margin) = COLD, UP or DOWN.

The first part asks whether it could be noise. The second is for what a short probe gets wrong about a long run (the
short-horizon bias, Wu et al. 2018). A lower rate shows at once what a higher one only shows after the run's own
decay: so probes are biased against higher rates along the run, and what speaks for one all the same is believed
soon (UP), what speaks for a lower one late (DOWN). From the first weights the bias goes either way, and early in
the run there is little of it: there a lower rate is believed as soon as it would be from the first weights (COLD).
Without the evidence, the present rate stays, and is asked about again at a later stage.

Probes of a bracket (`plans.bracket`) are long, and lie on both sides: they are biased neither way, and both directions
need the same evidence (BRACKET). If the present rate is a guess of the first stage's short probes, and nobody's choice,
there is little to be kept, and half a standard deviation decides (GUESS).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]

COLD, UP, DOWN = (2.0, 0.15), (1.0, 0.05), (2.0, 0.5)
"""Of the evidence test: standard deviations of a difference that are no noise, and the least difference."""

BRACKET, GUESS = (1.0, 0.05), (0.5, 0.02)
"""The same of a bracket's long probes: where the present rate is somebody's choice, and where it is a guess."""

NEAR_SHARE = 0.25
"""Along the run, a move for a gain that would be none from the first weights goes no farther than it must: to a rate
that falls short of the best one by this share of the gain. Small gains are mostly noise, and moved runs too far."""

AMPLITUDE = 0.5
"""Prior standard deviation of a shortfall."""

RISE_UP, RISE_DOWN, RISE_MOST = 0.1, 0.2, 0.25
"""Prior mean of the shortfall one width above and below the present rate, and anywhere above: what users have is too
low more often than too high, and only too low by decades."""

PROGRESS_LENGTH = 0.4
"""Length scale over progress: what a stage at a fifth of the run says, holds for half of it."""

LEAST_STD = 0.03
"""No shortfall is known more exactly than this: the same rate from the same weights comes to as different losses."""

GRID_PER_DECADE = 20
APART_DECADES = 0.12
"""Rates that are asked for are at least this far apart."""

WORST = 2.0
"""Shortfalls above this are all the same: a probe that lost as much as the best one gained."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A probe's shortfall, in the notation above; `std` is its standard deviation."""

    x: float
    progress: float
    shortfall: float
    std: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence test says.

    Attributes:
        lr: the learning rate to go on with.
        moved: whether it is another than the present one.
        gain: shortfall of the present rate minus that of the best one.
        doubt: the standard deviation of `gain`.
        low: the least rate that is not clearly worse than the best.
        high: the greatest such rate.
    """

    lr: float
    moved: bool
    gain: float
    doubt: float
    low: float
    high: float


class RatePosterior:
    """The posterior of the shortfall at one progress.

    Args:
        present: the learning rate in use; the prior mean is least there.
        width: decades over which rates differ.
        progress: the present p.
        seen: all probes that held.
        low: the least learning rate that may be asked or decided for.
        high: the greatest.
        evidence: (clearly, margin) for both directions; by default they follow from the progress.
    """

    def __init__(
        self,
        present: float,
        width: float,
        progress: float,
        seen: Sequence[Seen],
        low: float,
        high: float,
        evidence: tuple[float, float] | None = None,
    ) -> None:
        self._present, self._centre = present, math.log10(present)
        self._width, self._progress = width, progress
        self._evidence = evidence
        count = max(2, math.ceil(math.log10(high / low) * GRID_PER_DECADE) + 1) if high > low else 1
        self.grid: Array = np.linspace(math.log10(low), math.log10(high), count)
        self._x = np.array([s.x for s in seen])
        self._at = np.array([s.progress for s in seen])
        self._y = np.array([min(s.shortfall, WORST) for s in seen])
        self._std = np.array([s.std for s in seen])
        noise = np.maximum(LEAST_STD, self._std) ** 2
        # Inverted once: it has a row for each probe of the run, a dozen or two.
        self._inverse = np.linalg.inv(
            self._kernel(self._x, self._x, self._at[:, None] - self._at) + np.diag(noise)
        )
        self._weights: Array = self._inverse @ (self._y - self._prior(self._x))

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Return mu, shape [n], and its covariance, shape [n, n], at log10 rates of shape [n]."""
        across = self._across(x)
        covariance: Array = self._kernel(x, x, 0.0) - across @ self._inverse @ across.T
        return self._mean(x, across), covariance

    def _mean_and_std(self, x: Array) -> tuple[Array, Array]:
        """Return mu and its standard deviation, each of shape [n]: the covariance of a whole grid costs far more."""
        across = self._across(x)
        variance = AMPLITUDE**2 - np.sum((across @ self._inverse) * across, axis=1)
        return self._mean(x, across), np.sqrt(np.maximum(1e-12, variance))

    def _mean(self, x: Array, across: Array) -> Array:
        """Return mu at log10 rates of shape [n], given what `_across` says of them."""
        mean: Array = across @ self._weights + self._prior(x)
        return mean

    def _across(self, x: Array) -> Array:
        """Return the kernel of log10 rates at the present progress and what was seen, of shape [n, seen]."""
        return self._kernel(x, self._x, self._progress - self._at)

    def _kernel(self, a: Array, b: Array, later: Array | float) -> Array:
        """Return the Matern-5/2 kernel, of shape [n, m].

        Args:
            a, b: log10 rates of shapes [n] and [m].
            later: by how much the progress of those in `a` is greater; broadcasts to [n, m].
        """
        apart = (a[:, None] - b) / self._width
        r = math.sqrt(5) * np.sqrt(apart**2 + (later / PROGRESS_LENGTH) ** 2)
        kernel: Array = AMPLITUDE**2 * (1 + r + r**2 / 3) * np.exp(-r)
        return kernel

    def ask(self, taken: Sequence[float], even: bool = False, free: bool = False) -> tuple[float, float]:
        """Return the rate of the greatest expected improvement on the present one, and that improvement.

        Only what the evidence test would accept counts: an improvement on the best mean so far by the margin.

        Args:
            taken: log10 rates that have been asked for in this stage.
            even: whether a lower rate is as likely to be better as a higher one.
            free: whether the present rate need not be kept, and any improvement counts.
        """
        known = np.array(taken if free and taken else [self._centre, *taken])
        mean, sigma = self._mean_and_std(self.grid)
        best = float(self._mean(known, self._across(known)).min())
        up, down = (0.0 if free else self._rule(away, even)[1] for away in (1.0, -1.0))
        z = (best - np.where(self.grid > self._centre, up, down) - mean) / sigma
        hope: Array = sigma * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        for x in taken:
            hope = np.where(np.abs(self.grid - x) < APART_DECADES, -1.0, hope)
        at = int(np.argmax(hope))
        return float(10 ** self.grid[at]), float(hope[at])

    def _rule(self, away: float, even: bool) -> tuple[float, float]:
        """Return (clearly, margin) of the evidence test for a move by `away` decades."""
        if self._evidence is not None:
            return self._evidence
        if away > 0:
            return UP if self._progress else COLD
        return COLD if even else DOWN

    def best(self, held: Sequence[float]) -> float:
        """Return the learning rate of the lowest mean between log10 rates that held."""
        points = self._between(held)
        return float(10 ** points[int(np.argmin(self._mean(points, self._across(points))))])

    def _between(self, held: Sequence[float]) -> Array:
        """Return log10 rates that held, and those of the grid between them."""
        inside = (self.grid >= min(held) - 1e-9) & (self.grid <= max(held) + 1e-9)
        return np.concatenate([self.grid[inside], np.array(held)])

    def decide(self, held: Sequence[float], must_move: bool = False, even: bool = False) -> Verdict:
        """Return the rate to go on with.

        Args:
            held: log10 rates of this stage that held, one at least; nothing outside of them is decided for.
            must_move: whether the present rate has diverged.
            even: whether a lower rate is as likely to be better as a higher one.
        """
        points = np.concatenate([self._between(held), [self._centre]])
        mean, covariance = self.predict(points)
        best = int(np.argmin(mean[:-1]))
        gain = float(mean[-1] - mean[best])
        spread = covariance[-1, -1] + covariance[best, best] - 2 * covariance[-1, best]
        doubt = math.sqrt(max(0.0, float(spread)))
        clearly, margin = self._rule(float(points[best]) - self._centre, even)
        elsewhere = abs(float(points[best]) - self._centre) > 1e-9
        moved = must_move or (elsewhere and gain > clearly * doubt and gain > margin)
        variance = np.diag(covariance) + covariance[best, best] - 2 * covariance[:, best]
        as_good = mean - mean[best] <= np.maximum(COLD[1], COLD[0] * np.sqrt(np.maximum(0.0, variance)))
        good = points[:-1][as_good[:-1]]
        lr = 10 ** float(points[best]) if moved else self._present
        if moved and self._progress and not must_move and self._evidence is None and gain < COLD[1]:
            lr = 10 ** self._nearest(points, mean, best, NEAR_SHARE * gain)
        return Verdict(lr, moved, gain, doubt, 10 ** float(good.min()), 10 ** float(good.max()))

    def _nearest(self, points: Array, mean: Array, best: int, slack: float) -> float:
        """Return the nearest to the present rate of the points towards the best one that are as good, up to `slack`."""
        away = (points - self._centre) * np.sign(points[best] - self._centre)
        as_good = (
            (away > 0) & (away <= abs(points[best] - self._centre) + 1e-9) & (mean <= mean[best] + slack)
        )
        return float(points[as_good][np.argmin(away[as_good])])

    def _prior(self, x: Array) -> Array:
        widths = (x - self._centre) / self._width
        mean: Array = np.where(widths > 0, np.minimum(RISE_UP * widths**2, RISE_MOST), RISE_DOWN * widths**2)
        return mean
