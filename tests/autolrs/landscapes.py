"""Training in one's head: a loss that falls fastest at a known learning rate, and explodes above another."""

import math
from collections.abc import Sequence

import numpy as np

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.schedule import run_curve


class Landscape:
    """A run whose excess loss shrinks at each step by a share that depends on the learning rate.

    Args:
        best: the learning rate at which it shrinks fastest.
        edge: at `edge * best` and above, the excess loss grows instead.
        scatter: standard deviation of an observed training loss, as a share of it.
        seed: of that scatter.
        speed: the share by which the excess shrinks at best.
    """

    def __init__(
        self,
        best: float,
        edge: float = 30.0,
        scatter: float = 0.02,
        seed: int = 0,
        speed: float = 0.03,
    ) -> None:
        self.best, self.edge, self.scatter, self.speed = best, edge, scatter, speed
        self.excess = self.kept = 3.0
        self.taken = self.kept_taken = 0
        self.seed, self.rng = seed, np.random.default_rng(seed)

    @property
    def loss(self) -> float:
        """The loss at the present weights."""
        return 0.5 + self.excess

    def shrinks(self, lr: float) -> float:
        """Return the share by which the excess shrinks in a step now; below 0 where it grows."""
        if lr >= self.edge * self.best:
            return -1.0
        return self.speed * math.exp(-(math.log(lr / self.best) ** 2) / 2)

    def steps(
        self, lrs: Sequence[float], rng: np.random.Generator, above: float = math.inf
    ) -> tuple[float, ...]:
        """Take steps; return their observed losses, each of the weights before its step."""
        losses = []
        for lr in lrs:
            losses.append(self.loss * math.exp(self.scatter * rng.normal()))
            self.excess = min(self.excess * (1 - self.shrinks(lr)), 1e300)
            self.taken += 1
            if not losses[-1] <= above:
                break
        return tuple(losses)

    def perform(self, action: Action) -> Result:
        """Carry out an action."""
        if isinstance(action, Snapshot):
            self.kept, self.kept_taken = self.excess, self.taken
        elif isinstance(action, Restore):
            self.excess, self.taken = self.kept, self.kept_taken
        elif isinstance(action, Evaluate):
            return Result(val_loss=self.loss)
        elif isinstance(action, Train):
            return Result(losses=self.steps(action.lrs, self.rng))
        elif isinstance(action, Probe):
            self.excess, self.taken = self.kept, self.kept_taken
            draw = np.random.default_rng([self.seed, action.stage, action.draw])
            losses = self.steps(action.lrs, draw, action.abort_above)
            held = len(losses) == len(action.lrs) and losses[-1] <= action.abort_above
            return Result(losses=losses, val_loss=self.loss if action.evaluate and held else None)
        return Result()


class Plateau(Landscape):
    """Nothing to be seen of a learning rate for the first steps: the loss stays where it is, whatever the rate."""

    flat_steps = 80

    def shrinks(self, lr: float) -> float:
        shrunk = super().shrinks(lr)
        return shrunk if self.taken >= self.flat_steps or shrunk < 0 else 0.0


class Drifting(Landscape):
    """The best learning rate rises tenfold over the first half of a run of 1,000 steps."""

    def shrinks(self, lr: float) -> float:
        return super().shrinks(lr / 10 ** min(1.0, self.taken / 500))


class FallingCliff(Landscape):
    """The edge comes down while training, from 30 times the best rate to 1.5 times it."""

    def shrinks(self, lr: float) -> float:
        edge = 30.0 * 0.05 ** min(1.0, self.taken / 500)
        return -0.3 if lr >= edge * self.best else super().shrinks(lr)


class TwoValleys(Landscape):
    """Two narrow valleys: at the best rate, and at a tenth of it, where the loss falls a third as fast."""

    def shrinks(self, lr: float) -> float:
        if lr >= self.edge * self.best:
            return -1.0
        deep, shallow = (math.log(lr / self.best * factor) for factor in (1, 10))
        return self.speed * max(math.exp(-(deep**2)), math.exp(-(shallow**2)) / 3)


def drive(controller: Controller, landscape: Landscape) -> list[Action]:
    """Carry out a whole run; return its actions."""
    actions: list[Action] = []
    while not isinstance(action := controller.next(), Done):
        actions.append(action)
        controller.tell(landscape.perform(action))
    return actions


def final_loss(landscape: Landscape, controller: Controller, peak: float) -> float:
    """Return where a schedule of the controller's own shape ends, with this peak and no search."""
    config = controller.config
    fresh = type(landscape)(landscape.best, landscape.edge, 0.0, speed=landscape.speed)
    fresh.steps([peak * run_curve(t, config) for t in range(config.max_steps)], np.random.default_rng(0))
    return fresh.loss


def regret(landscape: Landscape, controller: Controller) -> float:
    """Return the loss above that of the best schedule of the same shape, as a share of what that one gains."""
    first = type(landscape)(landscape.best).loss
    best = min(final_loss(landscape, controller, peak) for peak in np.geomspace(1e-5, 1.0, 60))
    return (landscape.loss - best) / (first - best)


def best_peak(landscape: Landscape, controller: Controller) -> float:
    """Return the peak that ends a run lowest, of a schedule of the controller's own shape."""
    peaks = np.geomspace(*controller.config.lr_range, 200)
    return float(min(peaks, key=lambda peak: final_loss(landscape, controller, peak)))
