"""Search: ask/tell Bayesian optimisation of a noisy loss over the logarithm of the learning rate.

Notation (Rasmussen and Williams 2006, chapter 2): x is log10 of a learning rate, y a loss told for it with
standard deviation s; a Gaussian process with a Matern-5/2 kernel and the noise s^2 of each point on its diagonal
has the posterior mean mu(x) and standard deviation sigma(x).

Losses are scaled by their own spread before the fit, so the search for f and for 3f + 7 is the same. A learning
rate that diverged is no loss to be fitted: it is a ceiling (a censored observation), and nothing at or above the
lowest ceiling is asked or decided for. The AutoLRS reference tells 1e6 instead, which flattens all other losses.

The acquisition is the expected improvement over the best posterior mean, or, with a kappa, the paper's lower
confidence bound mu - kappa sigma. The reference has kappa = 1e6, with which it asks for the same learning rates
whatever the losses are.

One dimension needs no optimiser: everything is read off a grid.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

Array = NDArray[np.float64]

GRID_POINTS = 161
LENGTH_DECADES = 0.8
"""Length scale of the kernel before the fit moves it, in decades of learning rate."""

LENGTH_BOUNDS = (0.25, 4.0)
APART_DECADES = 0.15
"""Rates that are asked for at once are at least this far apart, in decades, where the range has room for it."""

TOO_LARGE = 1e100
"""A loss beyond this diverged, too: its square would not be finite."""

LEAST_NOISE = 1e-3
"""No point is believed more exactly than this, relative to the losses' spread."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A loss told for a learning rate; a loss that is infinite stands for a probe that diverged."""

    lr: float
    loss: float
    std: float

    @property
    def diverged(self) -> bool:
        """Whether this probe diverged."""
        return not math.isfinite(self.loss)


@dataclass(frozen=True, slots=True)
class Decision:
    """The learning rate to train with.

    Attributes:
        lr: the learning rate.
        loss: its posterior mean loss; not finite where nothing finite was told.
        std: its posterior standard deviation.
    """

    lr: float
    loss: float
    std: float


class LRSearch:
    """Bayesian optimisation over one learning rate.

    Args:
        low: the least learning rate.
        high: the greatest learning rate.
        kappa: weight of sigma in a lower confidence bound; None for the expected improvement.

    Raises:
        ValueError: low and high are no range of positive numbers.
    """

    def __init__(self, low: float, high: float, kappa: float | None = None) -> None:
        if not 0 < low < high < math.inf:
            raise ValueError(f"low={low!r}, high={high!r}: must be a range of positive learning rates.")
        self.low, self.high, self.kappa = low, high, kappa
        self.observations: list[Observation] = []

    def tell(self, lr: float, loss: float, std: float = 0.0) -> None:
        """Take a loss and its standard deviation; a loss that is not finite says that the probe diverged."""
        finite = math.isfinite(loss) and abs(loss) < TOO_LARGE
        self.observations.append(Observation(lr, loss if finite else math.inf, abs(std) if finite else 0.0))

    @property
    def ceiling(self) -> float:
        """The lowest learning rate that diverged; infinite where none did."""
        return min((o.lr for o in self.observations if o.diverged), default=math.inf)

    @property
    def grid(self) -> Array:
        """Learning rates that may be asked or decided for, evenly spaced on the log scale."""
        top = self.high
        if self.ceiling <= self.high:
            held = [o.lr for o in self.observations if not o.diverged and o.lr < self.ceiling]
            # Halfway (on the log scale) between what held and what did not; half a decade where nothing held.
            top = math.sqrt(max(held) * self.ceiling) if held else self.ceiling / math.sqrt(10)
            top = min(self.high, max(top, self.low * (1 + 1e-9)))
        grid: Array = np.geomspace(self.low, top, GRID_POINTS)
        return grid

    def posterior(self, lrs: list[float] | Array) -> tuple[Array, Array]:
        """Return mu and sigma at learning rates, each of shape [len(lrs)].

        Raises:
            ValueError: no finite loss has been told.
        """
        mean, covariance = self._predict(np.asarray(lrs, dtype=float), [])
        return mean, np.sqrt(np.maximum(0.0, np.diag(covariance)))

    def ask(self, count: int = 1) -> list[float]:
        """Return learning rates to probe next, to be probed in parallel if there are several.

        Each one is asked as if those before it had answered their posterior mean (the Kriging believer of
        Ginsbourger et al. 2010). Where nothing finite is known, they spread over the range.
        """
        grid = self.grid
        if all(o.diverged for o in self.observations):
            return [float(v) for v in np.geomspace(grid[0], grid[-1], count + 2)[1:-1]]
        believed: list[Observation] = []
        decades = np.log10(grid)
        # Two probes at one rate tell less than two at different ones, even where no improvement is expected elsewhere.
        apart = min(APART_DECADES, float(decades[-1] - decades[0]) / (2 * count))
        for _ in range(count):
            mean, covariance = self._predict(grid, believed)
            sigma = np.sqrt(np.maximum(1e-18, np.diag(covariance)))
            value = self._acquisition(mean, sigma)
            for other in believed:
                value[np.abs(decades - math.log10(other.lr)) < apart] = -math.inf
            best = int(np.argmax(value))
            believed.append(Observation(float(grid[best]), float(mean[best]), 0.0))
        return [o.lr for o in believed]

    def _acquisition(self, mean: Array, sigma: Array) -> Array:
        """Return the acquisition of a probe at each point, of the shape of mu and sigma."""
        if self.kappa is not None:
            return self.kappa * sigma - mean
        z = (mean.min() - mean) / sigma
        improvement: Array = sigma * (z * norm.cdf(z) + norm.pdf(z))
        return improvement

    def decide(self) -> Decision:
        """Return the learning rate of the lowest posterior mean."""
        grid = self.grid
        if all(o.diverged for o in self.observations):
            return Decision(float(grid[0]), math.inf, math.inf)
        mean, covariance = self._predict(grid, [])
        best = int(np.argmin(mean))
        std = math.sqrt(max(0.0, covariance[best, best]))
        return Decision(float(grid[best]), float(mean[best]), std)

    def _predict(self, lrs: Array, believed: list[Observation]) -> tuple[Array, Array]:
        """Return the posterior mean, shape [n], and covariance, shape [n, n], in the losses' own units."""
        told = [o for o in [*self.observations, *believed] if not o.diverged]
        if not told:
            raise ValueError("no finite loss has been told yet.")
        x = np.log10([[o.lr] for o in told])
        y = np.array([o.loss for o in told])
        centre = float(np.median(y))
        spread = float(np.std(y)) or max(abs(centre), 1.0) * 1e-3
        noise = np.maximum(LEAST_NOISE, np.array([o.std for o in told]) / spread) ** 2
        process = fit_process(x, (y - centre) / spread, noise)
        mean, covariance = process.predict(np.log10(lrs)[:, None], return_cov=True)
        return mean * spread + centre, covariance * spread**2


def fit_process(x: Array, y: Array, noise: Array) -> GaussianProcessRegressor:
    """Return a fitted Gaussian process: x [n, 1] in decades, y [n] of unit spread, noise variances [n].

    Falls back in steps: fitted length and amplitude; both held at their start; the same with more noise.
    """
    amplitude, matern = ConstantKernel(1.0, (0.1, 10.0)), Matern(LENGTH_DECADES, LENGTH_BOUNDS, nu=2.5)
    held = ConstantKernel(1.0, "fixed") * Matern(LENGTH_DECADES, "fixed", nu=2.5)
    # Two points cannot tell a length scale.
    tries = [(amplitude * matern, noise), (held, noise), (held, noise + 0.1)][0 if len(y) > 2 else 1 :]
    for kernel, alpha in tries:
        try:
            with warnings.catch_warnings():
                # A length or an amplitude at its bound is an answer, not a failure.
                warnings.simplefilter("ignore", ConvergenceWarning)
                process = GaussianProcessRegressor(kernel, alpha=alpha).fit(x, y)
            if np.isfinite(process.predict(x)).all():
                return process
            problem = "its posterior is not finite"
        except (ValueError, np.linalg.LinAlgError) as error:
            problem = str(error)
        warnings.warn(
            f"the Gaussian process could not be fitted ({problem}); trying a simpler one", stacklevel=2
        )
    raise ValueError("the losses cannot be fitted by any Gaussian process: are they finite?")
