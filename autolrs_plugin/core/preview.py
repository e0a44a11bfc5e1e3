"""A preview: a plan played on a stand-in job, to see beforehand what it would do. Nothing is trained.

The stand-in is the noisy quadratic model (Zhang et al. 2019, "Which algorithmic choices matter at which batch
sizes?", section 3): SGD at learning rate a on directions of curvature h_i with gradient noise of variance h_i, in
expectation:

    m_i <- (1 - a h_i)^2 m_i + a^2 h_i      L = (sum_i h_i m_i) / 2 + FLOOR

It has what a plan has to cope with: a rate above which it diverges, slow directions that need large rates, and a noise
that only a decay removes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train, ends
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller

DIRECTIONS = 12
CONDITION = 1e3
FLOOR = 0.1


@dataclass(frozen=True, slots=True)
class Preview:
    """What was played: the controller at its end, and the actions with their results in order."""

    controller: Controller
    actions: tuple[tuple[Action, Result], ...]


class StandIn:
    """A job that only computes the loss that the noisy quadratic model has.

    Args:
        top_lr: the rate above which it diverges.
        seed: of the scatter of its training losses.
        scatter: that scatter's standard deviation, relative to the loss.
    """

    def __init__(self, top_lr: float, seed: int = 0, scatter: float = 0.02) -> None:
        self._curvatures = np.geomspace(2.0 / top_lr, 2.0 / top_lr / CONDITION, DIRECTIONS)
        # Each direction begins with the same share of the loss.
        self._moments = 4.0 / DIRECTIONS / self._curvatures
        self._kept = self._moments
        self._seed, self._scatter = seed, scatter
        self._taken = 0

    def carry_out(self, action: Action) -> Result:
        """Return what the action would give; seconds are not made up and stay 0."""
        losses: tuple[float, ...] = ()
        val_loss = None
        if isinstance(action, Snapshot):
            self._kept = self._moments
        elif isinstance(action, Restore):
            self._moments = self._kept
        elif isinstance(action, Train):
            losses = self._steps(action.lrs, None, [self._seed, 0, self._taken])
            self._taken += 1
        elif isinstance(action, Probe):
            self._moments = self._kept
            losses = self._steps(action.lrs, action.abort_above, [self._seed, 1, action.stage, action.draw])
            if action.evaluate and len(losses) == len(action.lrs):
                val_loss = self._loss()
        elif isinstance(action, Evaluate):
            val_loss = self._loss()
        return Result(losses=losses, val_loss=val_loss)

    def _steps(self, lrs: tuple[float, ...], abort_above: float | None, seed: list[int]) -> tuple[float, ...]:
        scatter = 1.0 + self._scatter * np.random.default_rng(seed).standard_normal(len(lrs))
        losses: list[float] = []
        for lr, factor in zip(lrs, scatter, strict=True):
            losses.append(self._loss() * float(factor))
            with np.errstate(over="ignore", invalid="ignore"):
                h: NDArray[np.float64] = self._curvatures
                self._moments = (1 - lr * h) ** 2 * self._moments + lr**2 * h
            if abort_above is not None and ends(losses, abort_above):
                break
        return tuple(losses)

    def _loss(self) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return float(self._curvatures @ self._moments) / 2 + FLOOR


def preview_run(config: AutoLRSConfig, best_lr: float | None = None) -> Preview:
    """Play a whole run on a stand-in job.

    Args:
        config: the run's settings.
        best_lr: about the greatest rate that the stand-in bears; the middle of `lr_range` on the log scale if not
            given.

    Raises:
        ConfigError: `best_lr` is not within `lr_range`.
    """
    low, high = config.lr_range
    best = math.sqrt(low * high) if best_lr is None else best_lr
    if not low <= best <= high:
        raise ConfigError(f"best_lr={best_lr!r}: must lie within lr_range={config.lr_range!r}.")
    controller = Controller(config)
    return Preview(controller, tuple(_played(controller, StandIn(2.0 * best, config.seed))))


def _played(controller: Controller, job: StandIn) -> Iterator[tuple[Action, Result]]:
    while not isinstance(action := controller.next(), Done):
        result = job.carry_out(action)
        controller.tell(result)
        yield action, result


def shortcoming(config: AutoLRSConfig) -> str:
    """Return a sentence on what so short a run has no room for, the search or its evaluations; otherwise nothing.

    Only as much is played as it takes to see a probe that is evaluated: in a long run, the first one.
    """
    if config.mode == "paper":  # its lengths are the published ones, whatever the run's
        return ""
    probed = False
    job = StandIn(2.0 * math.sqrt(config.lr_range[0] * config.lr_range[1]), config.seed)
    for action, _ in _played(Controller(config), job):
        if isinstance(action, Probe):
            probed = True
            if action.evaluate or not config.validation:
                return ""
    if probed:
        return (
            f"validation: decides nothing in so short a run (max_steps={config.max_steps}): the training losses of "
            f"the probes decide. An evaluation counts as eval_cost_steps={config.eval_cost_steps:g} steps, and "
            "the search has no room for that; give a smaller eval_cost_steps if an evaluation costs less."
        )
    return (
        f"max_steps={config.max_steps}: leaves no room for a search (search_budget={config.search_budget:g} of the "
        "steps), so the learning rate is the one that the run begins with; give more steps, or a larger search_budget."
    )
