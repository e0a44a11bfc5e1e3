"""Training in one's head: a noisy quadratic, whose best learning rate is known.

Notation (Zhang et al. 2019, "Which algorithmic choices matter at which batch sizes?"): in each direction i of curvature
h_i, SGD at rate lr takes v_i = E[w_i^2] to (1 - lr h_i)^2 v_i + lr^2 h_i s^2; the loss is the mean of h_i v_i / 2, on
a floor. Slow directions want a large rate, the noise s a small one at the end, and 2 / h_max is where it diverges: a
short run misjudges the best rate of a long one as in real training.
"""

import math
from collections.abc import Sequence

import numpy as np

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.schedule import unit_curve, warmup_steps


class Landscape:
    """A run on a noisy quadratic.

    Args:
        best_scale: learning rates are in units of this; all of the landscape moves with it.
        noise: of the gradient (s), which makes large rates costly.
        scatter: standard deviation of an observed training loss, relative to the loss.
        seed: of that scatter.
    """

    def __init__(
        self, best_scale: float = 1.0, noise: float = 0.3, scatter: float = 0.05, seed: int = 0
    ) -> None:
        self.curvature = np.geomspace(0.02, 1.0, 12) / best_scale
        self.weight = 1.0 / self.curvature
        self.noise, self.scatter, self.scale = noise, scatter, best_scale
        self.v = np.ones(12)
        self.kept = self.v.copy()
        self.rng = np.random.default_rng(seed)

    def loss(self) -> float:
        """Return the expected loss at the present weights."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(0.1 + np.mean(self.curvature * self.weight * self.v))

    def steps(
        self, lrs: Sequence[float], rng: np.random.Generator, above: float = math.inf
    ) -> tuple[float, ...]:
        """Take steps; return their observed losses."""
        losses = []
        for lr in lrs:
            observed = self.loss() * math.exp(self.scatter * rng.normal())
            losses.append(observed if math.isfinite(observed) else math.nan)
            with np.errstate(over="ignore", invalid="ignore"):
                step = lr * self.curvature
                self.v = (1 - step) ** 2 * self.v + step**2 * self.noise**2
            if not losses[-1] <= above:
                break
        return tuple(losses)

    def perform(self, action: Action) -> Result:
        """Carry out an action."""
        if isinstance(action, Snapshot):
            self.kept = self.v.copy()
        elif isinstance(action, Restore):
            self.v = self.kept.copy()
        elif isinstance(action, Evaluate):
            return Result(val_loss=self.loss())
        elif isinstance(action, Train):
            return Result(losses=self.steps(action.lrs, self.rng))
        elif isinstance(action, Probe):
            self.v = self.kept.copy()
            draw = np.random.default_rng([action.stage, action.draw])
            losses = self.steps(action.lrs, draw, action.abort_above)
            held = math.isfinite(losses[-1]) and losses[-1] <= action.abort_above
            # A loss of the probe's last weights; it may have diverged since its last training loss.
            return Result(losses=losses, val_loss=self.loss() if action.evaluate and held else None)
        return Result()


def drive(controller: Controller, landscape: Landscape) -> list[Action]:
    """Carry out a whole run; return its actions."""
    actions = []
    while not isinstance(action := controller.next(), Done):
        actions.append(action)
        controller.tell(landscape.perform(action))
    return actions


def final_loss(landscape: Landscape, lrs: Sequence[float]) -> float:
    """Return the expected loss after a whole run from fresh weights."""
    fresh = Landscape(landscape.scale, landscape.noise)
    fresh.steps(lrs, np.random.default_rng(0))
    loss = fresh.loss()
    return loss if math.isfinite(loss) else math.inf


def best_peak(landscape: Landscape, controller: Controller) -> tuple[float, float]:
    """Return the best peak of the controller's own kind of schedule, and the loss that it comes to."""
    config = controller.config
    steps, warmup = config.max_steps, warmup_steps(config)
    unit = np.array([unit_curve(t, steps, warmup, config.final_decay) for t in range(steps)])
    peaks = np.geomspace(*config.lr_range, 400)
    losses = [final_loss(landscape, peak * unit) for peak in peaks]
    best = int(np.argmin(losses))
    return float(peaks[best]), losses[best]
