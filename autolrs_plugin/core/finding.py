"""Finding: the result of a search without a training: a learning rate, its interval, and whether to rely on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.plans.horizon import HORIZON_STD
from autolrs_plugin.core.state import RunState, Stage

LEAST_PROBES = 3
LEAST_STEPS = 20
"""Shorter probes say little of a long run: the rates that they find are off by factors of 3 to 7."""

PLATEAU_Z = 3.0
"""Where the best probe's gain is below this, in standard deviations of a minibatch's loss, nothing is known yet."""

NORMAL_MEDIAN = 1.048
"""The standard deviation of normal noise, in medians of the absolute difference of two."""

WIDEST_DECADES = 1.5
"""An interval that is wider says nothing that a user does not know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a search for a learning rate.

    Attributes:
        lr: the learning rate to train with, of the first parameter group; the optimizer's own where nothing is known.
        low: the lowest learning rate that is not clearly worse than the best.
        high: the highest such rate.
        confident: whether the rate can be relied on.
        reason: one sentence on why.
        steps: training steps that it took; all of them were taken back.
    """

    lr: float
    low: float
    high: float
    confident: bool
    reason: str
    steps: int

    def __str__(self) -> str:
        if not self.confident:
            return f"no learning rate to rely on after {self.steps} steps: {self.reason}"
        return f"{self.lr:.3g}, within {self.low:.3g} to {self.high:.3g} ({self.steps} steps: {self.reason})"


def finding(state: RunState) -> Finding:
    """Return what the last stage of a run found out."""
    low, high = state.config.lr_range
    prior = state.config.starting_lr or math.sqrt(low * high)
    if not state.stages:
        budget = round(state.config.search_budget * state.config.max_steps)
        reason = f"the budget of {budget} steps has no room for three probes; {_advice(state.config)}"
        return Finding(prior, low, high, False, reason, 0)
    stage = state.stages[-1]
    # Whatever the probes say of each other, they do not know the long run any better.
    low = max(low, min(stage.low, stage.chosen_lr / 10**HORIZON_STD))
    high = min(high, max(stage.high, stage.chosen_lr * 10**HORIZON_STD))
    doubt = _doubt(stage, _advice(state.config))
    return Finding(stage.chosen_lr, low, high, not doubt, doubt or stage.reason, stage.search_steps)


def _advice(config: AutoLRSConfig) -> str:
    """Return what helps where probes tell too little."""
    if config.mode != "find":
        return "the run's folder holds no more, so give its script to find with"
    if config.search_budget < 1:
        return "give a larger share (share=, --share)"
    return f"the share is all of max_steps={config.max_steps}, so it takes a longer run"


def _doubt(stage: Stage, advice: str) -> str:
    """Return why a stage's decision is not to be relied on, with what helps; empty where it is."""
    held = [c for c in stage.candidates if not c.diverged]
    if stage.candidates and not held:
        finite = any(all(map(math.isfinite, c.losses)) for c in stage.candidates)
        helps = "" if finite else "none had only finite losses, so look into the loss and the data, or "
        return f"all {len(stage.candidates)} probes diverged; {helps}give an lr_range with a lower end"
    if len(stage.candidates) < LEAST_PROBES:
        return f"there were only {len(stage.candidates)} probes, too few to compare; {advice}"
    steps = max(len(c.losses) for c in held)
    if steps < LEAST_STEPS:
        return f"probes of {steps} steps are too short to predict a long run, which takes {LEAST_STEPS}; {advice}"
    first, best = float(np.median([c.losses[0] for c in held])), min(held, key=lambda c: c.forecast)
    if first - best.forecast <= PLATEAU_Z * _scatter(best.losses):
        return f"no learning rate has lowered the loss by more than its noise yet; {advice}"
    if math.log10(stage.high / stage.low) > WIDEST_DECADES:
        return f"all rates from {stage.low:.3g} to {stage.high:.3g} are about equally good; {advice}"
    return ""


def _scatter(losses: Sequence[float]) -> float:
    """Return the standard deviation of a minibatch's loss; of the median, for a probe may rise before it falls."""
    return float(np.median(np.abs(np.diff(losses)))) * NORMAL_MEDIAN
