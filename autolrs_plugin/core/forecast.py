"""Forecasts: the loss that a short, noisy training curve is heading for, and how far to trust that.

Notation (AutoLRS, section 3.2): L(t) is the loss at step t, t = 0 .. n-1; tau is the step forecast.
    exponential   L(t) = a exp(-t / T) + c      a >= 0, c >= a floor
    power law     L(t) = a (1 + t)^-p + c       the same bounds

The paper fits the exponential by least squares without bounds; on noisy curves that predicts losses below any
that can be, and the search then rewards the noise. Here both families are bounded, fitted with a loss that
forgives outliers, and the one that predicts the last quarter from the rest is taken.

Curves that no such family describes have an answer of their own:
    a value that is not finite      diverged: infinite loss
    exploding (ends far above its start)   diverged as well
    rising                          its last level; the rise counts as uncertainty
    constant                        the constant
    shorter than SHORT steps        the mean of its second half
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]

TOO_LARGE = 1e100
"""A loss beyond this has diverged, too: its square would not be finite."""

SHORT = 8
"""A curve of fewer steps is not fitted."""

MOST_POINTS = 64
"""Longer curves are averaged into this number of bins first: the fit then costs the same for any curve."""

EXPLODED = 3.0
"""A curve exploded if it ends this far above its best level, in its own scale."""

RISING_Z = 3.0
"""A curve rises if its second half lies this number of standard errors above its first."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A predicted loss.

    Attributes:
        loss: the loss predicted; infinite where the curve diverged.
        std: its standard deviation; 0 where the curve diverged.
        model: how it was made: exponential, power, level, rising, constant, short or diverged.
    """

    loss: float
    std: float
    model: str

    @property
    def diverged(self) -> bool:
        """Whether the curve left every loss worth predicting."""
        return not math.isfinite(self.loss)


DIVERGED = Forecast(math.inf, 0.0, "diverged")


def forecast(losses: Sequence[float], tau: float, floor: float | None = None) -> Forecast:
    """Predict the loss at step `tau` from the losses of steps 0 .. n-1.

    Args:
        losses: training losses, shape [n].
        tau: the step to predict, n - 1 or later.
        floor: no loss can be below it; by default 0 for a curve of positive losses, and otherwise as far below
            the least loss as that is below the first.

    Raises:
        ValueError: there are no losses.
    """
    values = np.asarray(losses, dtype=float)
    if values.size == 0:
        raise ValueError("losses=[]: there is nothing to forecast from.")
    if not (np.abs(values) < TOO_LARGE).all():  # nor is it where a value is not a number
        return DIVERGED
    spread = float(np.ptp(values))
    if spread <= 1e-12 * (1.0 + float(np.abs(values).max())):
        return Forecast(float(values[-1]), 0.0, "constant")
    if len(values) < SHORT:
        half = values[len(values) // 2 :]
        return Forecast(float(half.mean()), float(values.std() / math.sqrt(len(half))), "short")
    t, means, weights = _binned(values)
    if _exploded(means, values):
        return DIVERGED
    first, second = np.array_split(means, 2)
    error = math.hypot(*(float(h.std()) / math.sqrt(len(h)) for h in (first, second)))
    last = means[-max(2, len(means) // 4) :]
    if second.mean() - first.mean() > RISING_Z * error:
        rise = float(second.mean() - first.mean())
        return Forecast(float(last.mean()), math.hypot(rise, float(last.std())), "rising")
    if floor is None:
        least = float(values.min())
        floor = 0.0 if least > 0 else least - abs(float(values[0]) - least)
    # In units of its own spread, so that no bound of the fit depends on the unit of the loss.
    unit = _fitted(t, means / spread, weights, max(tau, float(len(values) - 1)), floor / spread)
    return Forecast(unit.loss * spread, unit.std * spread, unit.model)


def _binned(values: Array) -> tuple[Array, Array, Array]:
    """Return steps, shape [2, bins], mean loss and number of steps of each bin.

    Two steps stand for those of a bin: they have the same mean and the same variance, so that a curve's mean over
    them is its mean over the bin, up to its third derivative. The middle of a bin alone lies below a convex curve.
    """
    parts = np.array_split(np.arange(len(values)), min(len(values), MOST_POINTS))
    middle, spread = np.array([p.mean() for p in parts]), np.array([p.std() for p in parts])
    means = np.array([values[p].mean() for p in parts])
    return np.array([middle - spread, middle + spread]), means, np.array([float(len(p)) for p in parts])


def _exploded(means: Array, values: Array) -> bool:
    """Tell whether the curve ends far above both its start and its usual scatter."""
    end = float(np.median(means[-max(2, len(means) // 8) :]))
    best = float(np.median(np.sort(means)[: max(2, len(means) // 4)]))
    usual = max(abs(float(values[0])), abs(best), 1e-12)
    return end - best > EXPLODED * usual and end > float(values[0])


def _exponential(p: Array, t: Array) -> Array:
    value: Array = p[0] * np.exp(-t / p[1]) + p[2]
    return value


def _power(p: Array, t: Array) -> Array:
    value: Array = p[0] * (1.0 + t) ** -p[1] + p[2]
    return value


Family = Callable[[Array, Array], Array]


def _fit(family: Family, t: Array, y: Array, w: Array, floor: float) -> tuple[Array, Array, float] | None:
    """Return parameters, their covariance and the noise of one step; None where the fit fails.

    `t` has the shape [2, n], see `_binned`; `y` and `w` have [n].
    """
    span, top = float(t.max() + 1.0), float(np.ptp(y))
    shape = (span / 50, span / 3, span * 20) if family is _exponential else (0.02, 0.5, 3.0)
    level = max(floor + 1e-9, float(y[-max(2, len(y) // 4) :].mean()) - 0.1 * top)
    start = [max(top, 1e-9), shape[1], level]
    low, high = [0.0, shape[0], floor], [20 * top + 1e-6, shape[2], float(y.max()) + top + 1e-6]
    root = np.sqrt(w)
    noise = max(1e-12, float(np.median(np.abs(np.diff(y)))))

    def residual(p: Array) -> Array:
        value: Array = root * (family(p, t).mean(axis=0) - y)
        return value

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit = least_squares(
                residual, start, bounds=(low, high), loss="soft_l1", f_scale=noise, max_nfev=60
            )
            jacobian = fit.jac
            variance = float(np.sum(residual(fit.x) ** 2)) / max(1, len(y) - 3)
            covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    except (ValueError, np.linalg.LinAlgError):
        return None
    return (fit.x, covariance, math.sqrt(variance)) if np.isfinite(fit.x).all() else None


def _fitted(t: Array, y: Array, w: Array, tau: float, floor: float) -> Forecast:
    """Fit both families, take the one that predicts the last quarter better, and extrapolate it."""
    cut = len(y) - max(2, len(y) // 4)
    errors: dict[str, float] = {}
    families: dict[str, Family] = {"exponential": _exponential, "power": _power}
    for name, family in families.items():
        part = _fit(family, t[:, :cut], y[:cut], w[:cut], floor)
        if part is not None:
            missed = (family(part[0], t[:, cut:]).mean(axis=0) - y[cut:]) ** 2
            # Twice the median is the mean of squares that are normal, and forgives an outlier.
            errors[name] = float(min(missed.mean(), 2.2 * np.median(missed)))
    for name in sorted(errors, key=errors.__getitem__):
        family = families[name]
        whole = _fit(family, t, y, w, floor)
        if whole is None:
            continue
        p, covariance, _ = whole
        at = np.array([tau])
        steps = 1e-4 * np.maximum(np.abs(p), 1e-6)
        slope = np.array(
            [(family(p + s, at) - family(p, at))[0] / s[i] for i, s in enumerate(np.diag(steps))]
        )
        variance = float(slope @ covariance @ slope)
        # What the holdout missed is a doubt about the family that the covariance does not know.
        std = math.sqrt(max(0.0, variance) + errors[name] / max(1, len(y) - cut))
        # A bound that is active makes the covariance too sure or too wild; the curve's own range caps it.
        return Forecast(float(family(p, at)[0]), min(std, float(np.ptp(y))), name)
    last = y[-max(2, len(y) // 4) :]
    return Forecast(float(last.mean()), float(last.std()), "level")
