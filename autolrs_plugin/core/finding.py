"""Finding: the result of a search without a training: a learning rate, its interval, and whether to rely on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.plans.horizon import HORIZON_STD
from autolrs_plugin.core.posterior import APART_DECADES
from autolrs_plugin.core.state import Candidate, RunState, Stage

LEAST_PROBES = 3
LEAST_STEPS = 20
"""Shorter probes say little of a long run: the rates that they find are off by factors of 3 to 7."""

PLATEAU_Z = 3.0
"""Where the best probe's gain is below this, in standard deviations of a minibatch's loss, nothing is known yet."""

NORMAL_MEDIAN = 1.048
"""The standard deviation of normal noise, in medians of the absolute difference of two."""

WIDEST_DECADES = 1.2
"""An interval that is wider says nothing that a user does not know."""

AT_FLOOR = 0.15
"""Where the best probe makes less of its gain than this in its last quarter, it was at the floor of its rate: a lower
one comes lower, given more steps. A gain in proportion to the rates so far would be 0.12, before the decay shows."""

KNOWN_STEPS = 40
"""The horizon is known for runs of up to this multiple of the length of the probes."""

RISEN, RISEN_LONG = 0.1, 0.5
"""A probe that was ended on a loss no farther above the first one, as a share of it, has not diverged; the second for
runs of more than KNOWN_STEPS times its length."""


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
    doubt = _doubt(stage, _advice(state.config)) or _doubt_of_the_rate(
        stage, state.config, math.log10(high / low)
    )
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
    return ""


def _doubt_of_the_rate(stage: Stage, config: AutoLRSConfig, decades: float) -> str:
    """Return why the best of a stage's rates is not to be relied on in the long run; empty where it is.

    Args:
        stage: one with enough to be told by its probes.
        config: of its run.
        decades: from the low end of the interval to the high one.
    """
    advice = _advice(config)
    held = sorted((c for c in stage.candidates if not c.diverged), key=lambda c: c.lr)
    best = min(held, key=lambda c: c.forecast)
    edge = _edge(stage, held, best, config)
    if edge:
        return f"the best rate probed, {best.lr:.3g}, is {edge}"
    if decades > WIDEST_DECADES:
        return f"rates over {decades:.1f} decades are about equally good; {advice}"
    many = config.max_steps / len(best.losses)
    if many > KNOWN_STEPS and _last_share(best, held[0]) < AT_FLOOR:
        return (
            f"at {best.lr:.3g} the loss had stopped falling before the end of a probe, so that in a run {many:.0f} "
            f"times as long a far lower rate may be better; {advice}"
        )
    return ""


def _edge(stage: Stage, held: Sequence[Candidate], best: Candidate, config: AutoLRSConfig) -> str:
    """Return at which edge of what is known the best probe's rate is; empty where it is at none.

    Args:
        stage: its stage.
        held: the probes that held, by rate.
        best: the best of them.
        config: of the run.
    """
    others = [c for c in held if c is not best]
    if not others or (best is not held[0] and best is not held[-1]):
        return ""
    beside = others[0] if best is held[0] else others[-1]
    above = [c for c in stage.candidates if c.diverged and c.lr > best.lr]
    if best is held[-1] and above:
        nearest = min(above, key=lambda c: c.lr)
        first, last = nearest.losses[0], nearest.losses[-1]
        risen = RISEN_LONG if config.max_steps > KNOWN_STEPS * len(best.losses) else RISEN
        if math.isfinite(last) and last - first < risen * abs(first):
            return (
                f"the highest that held, and the next one, {nearest.lr:.3g}, was ended before it had diverged; "
                f"{_advice(config)}"
            )
        return ""
    if beside.forecast - best.forecast <= best.std:  # as good, so it is no edge
        return ""
    if any(abs(math.log10(best.lr / end)) < APART_DECADES for end in config.lr_range):
        return "at an end of lr_range; give a wider range"
    return f"the {'lowest' if best is held[0] else 'highest'} one; {_advice(config)}"


def _last_share(best: Candidate, lowest: Candidate) -> float:
    """Return the share of its gain that a probe has made in its last quarter.

    Gains are counted from the probe of the lowest rate, on the same minibatches; its own from its first loss.
    """
    losses = np.array(best.losses)
    apart = losses - (losses[0] if best is lowest else np.array(lowest.losses)[: len(losses)])
    quarter = max(1, len(losses) // 4)
    end, before = float(apart[-quarter:].mean()), float(apart[-2 * quarter : -quarter].mean())
    return (before - end) / max(-end, 1e-12)


def _scatter(losses: Sequence[float]) -> float:
    """Return the standard deviation of a minibatch's loss; of the median, for a probe may rise before it falls."""
    return float(np.median(np.abs(np.diff(losses)))) * NORMAL_MEDIAN
