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
        self.seed, self.rng = seed, np.random.default_rng(seed)

    @property
    def loss(self) -> float:
        """The loss at the present weights."""
        return 0.5 + self.excess

    def steps(
        self, lrs: Sequence[float], rng: np.random.Generator, above: float = math.inf
    ) -> tuple[float, ...]:
        """Take steps; return their observed losses, each of the weights before its step."""
        losses = []
        for lr in lrs:
            losses.append(self.loss * math.exp(self.scatter * rng.normal()))
            distance = math.log(lr / self.best)
            growth = 1 - self.speed * math.exp(-(distance**2) / 2)
            self.excess = min(self.excess * (2.0 if lr >= self.edge * self.best else growth), 1e300)
            if not losses[-1] <= above:
                break
        return tuple(losses)

    def perform(self, action: Action) -> Result:
        """Carry out an action."""
        if isinstance(action, Snapshot):
            self.kept = self.excess
        elif isinstance(action, Restore):
            self.excess = self.kept
        elif isinstance(action, Evaluate):
            return Result(val_loss=self.loss)
        elif isinstance(action, Train):
            return Result(losses=self.steps(action.lrs, self.rng))
        elif isinstance(action, Probe):
            self.excess = self.kept
            draw = np.random.default_rng([self.seed, action.stage, action.draw])
            losses = self.steps(action.lrs, draw, action.abort_above)
            held = len(losses) == len(action.lrs) and losses[-1] <= action.abort_above
            return Result(losses=losses, val_loss=self.loss if action.evaluate and held else None)
        return Result()


def drive(controller: Controller, landscape: Landscape) -> list[Action]:
    """Carry out a whole run; return its actions."""
    actions = []
    while not isinstance(action := controller.next(), Done):
        actions.append(action)
        controller.tell(landscape.perform(action))
    return actions


def best_peak(landscape: Landscape, controller: Controller) -> float:
    """Return the peak that ends a run lowest, of a schedule of the controller's own shape."""
    config = controller.config
    unit = [run_curve(t, config) for t in range(config.max_steps)]
    peaks = np.geomspace(*config.lr_range, 200)

    def final(peak: float) -> float:
        fresh = Landscape(landscape.best, landscape.edge, 0.0, speed=landscape.speed)
        fresh.steps([peak * share for share in unit], np.random.default_rng(0))
        return fresh.loss

    return float(min(peaks, key=final))
