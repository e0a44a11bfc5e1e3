"""The default plan: find the peak of a decaying schedule early, then train along it."""

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot
from autolrs_plugin.core.schedule import unit_curve, warmup_steps
from autolrs_plugin.core.search import LRSearch
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage, probe_together
from autolrs_plugin.core.training_plan import diverged_above, train


@dataclass(frozen=True)
class Tactics:
    sweep: float = 0.04
    decades: float = 2.5
    probes: int = 6
    initial: int = 4
    warmup: float = 0.2
    least_steps: int = 3
    """Of a probe; where the budget has no room for two of them after the sweep, nothing is searched."""


def peak_plan(state: RunState, tactics: Tactics = Tactics()) -> Plan:
    """Search the peak from the first weights, then train to the end."""
    config = state.config
    steps = config.max_steps
    if state.budget_left_steps < 1 + _sweep_steps(state, tactics) + 2 * tactics.least_steps:
        peak, above = math.sqrt(config.lr_range[0] * config.lr_range[1]), math.inf
    else:
        yield Snapshot()
        low, high, above = yield from _range_test(state, tactics)
        stage = yield from _search_peak(state, tactics, low, high, above)
        state.stages.append(stage)
        yield Restore()
        peak = stage.chosen_lr
    warmup = warmup_steps(config)
    yield from train(state, lambda t: peak * unit_curve(t, steps, warmup, config.final_decay), steps, above)
    yield Done()


def _range_test(state: RunState, tactics: Tactics) -> Generator[Action, Result, tuple[float, float, float]]:
    config = state.config
    low, high = config.lr_range
    result = yield Probe(0, 0, (low,), math.inf, False)
    above = diverged_above(result.losses[0])
    n = _sweep_steps(state, tactics)
    lrs = tuple(float(v) for v in np.geomspace(low, high, n))
    result = yield Probe(0, 1, lrs, above, False)
    taken = len(result.losses)
    top = lrs[taken - 1]
    state.stages.append(
        Stage(
            0, 0, "range", (Candidate(top, lrs[:taken], result.losses, None, math.inf, 0.0),), top, taken, ""
        )
    )
    top = max(top, low * 1.01)
    return max(low, top / 10**tactics.decades), top, above


def _sweep_steps(state: RunState, tactics: Tactics) -> int:
    return max(8, round(tactics.sweep * state.config.max_steps))


def _search_peak(
    state: RunState, tactics: Tactics, low: float, high: float, above: float
) -> Generator[Action, Result, Stage]:
    config = state.config
    search = LRSearch(low, high)
    index, before = len(state.stages), state.ledger.search.steps
    evals = config.eval_cost_steps if config.validation else 0.0
    count = min(tactics.probes, int(state.budget_left_steps / tactics.least_steps))
    n = int(state.budget_left_steps / count - evals)
    evaluate = config.validation and n >= tactics.least_steps
    n = n if evaluate else int(state.budget_left_steps / count)
    candidates: list[Candidate] = []
    w = max(1, round(tactics.warmup * n))
    asks = [float(v) for v in np.geomspace(low, high, tactics.initial + 1)[:-1]][:count]
    while asks:
        curves = [tuple(lr * unit_curve(t, n, w) for t in range(n)) for lr in asks]
        probes = [Probe(index, len(candidates) + i, lrs, above, evaluate) for i, lrs in enumerate(curves)]
        results = yield from probe_together(state, probes)
        for lr, lrs, result in zip(asks, curves, results, strict=True):
            loss = math.inf
            if len(result.losses) == n:
                loss = (
                    result.val_loss
                    if result.val_loss is not None
                    else float(np.mean(result.losses[-n // 4 :]))
                )
            search.tell(lr, loss, 0.01)
            candidates.append(
                Candidate(lr, lrs[: len(result.losses)], result.losses, result.val_loss, loss, 0.01)
            )
        left = count - len(candidates)
        asks = search.ask(min(config.parallel_probes, left)) if left else []
    decision = search.decide()
    spent = state.ledger.search.steps - before
    return Stage(index, state.step, "peak", tuple(candidates), decision.lr, spent, "")
