"""For those who write an adapter, or train something unusual: is everything that a probe changes taken back?

`check_rollback` runs a job twice, with the same learning rates at the same real steps: once straight through, and once
with probes in between, at rates that are far too high and too low, over the ends of epochs, with and without
evaluations. What comes out must be the same, bit for bit.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from autolrs_plugin.core.actions import Done, Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.core.state import Plan, RunState
from autolrs_plugin.training.fingerprint import leaves

LEAST_STEPS = 4
SHOWN = 5
"""Most differences that are named; one that is missed tends to change many others."""


class RollbackError(AssertionError):
    """A run with probes did not come to what the run without them comes to."""


def check_rollback(run: Callable[[], Any], *, probe_steps: int = 12) -> None:
    """Run a job without probes and with them, and compare what comes out.

    In a job of several processes, call it on each of them.

    Args:
        run: builds everything afresh (model, data, optimizer, seeds, and a tuner of any adapter in its default mode),
            trains to the end, and returns what to compare: tensors, arrays and plain values, in any nesting of
            dictionaries and lists. Weights, the optimizer's state, and whatever your steps keep. It is called twice.
        probe_steps: steps of a probe; more than an epoch has, to see that the data are taken back as well.

    Raises:
        RollbackError: the two differ; the message names what does.
        ValueError: the tuner did not search, or has fewer than 4 steps.
    """
    with _plan(_straight) as straight:
        without = dict(leaves("", run()))
    with _plan(_with_probes(probe_steps)) as probed:
        tuned = dict(leaves("", run()))
    if not (straight and probed) and _decides():
        raise ValueError(
            "check_rollback: run() has made no tuner in its default mode, so nothing was searched."
        )
    different = [path for path in {**without, **tuned} if without.get(path) != tuned.get(path)]
    if different:
        more = f", and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        named = ", ".join(path or "the result" for path in different[:SHOWN])
        raise RollbackError(
            f"with probes, {named}{more} of what run() returns is not what it is without: something that a step "
            "changes is not rolled back."
        )


def _decides() -> bool:
    """Tell whether this process decides what is done next: of several, that is the first."""
    alone = not (distributed.is_available() and distributed.is_initialized())
    return alone or distributed.get_rank() == 0


def _rates(state: RunState) -> tuple[float, ...]:
    """Return the learning rate of each real step: no two neighbours are the same."""
    low, high = state.config.lr_range
    middle = state.config.starting_lr or math.sqrt(low * high)
    return tuple(min(high, middle * (1.0, 0.8, 0.9)[step % 3]) for step in range(state.config.max_steps))


def _straight(state: RunState) -> Plan:
    steps = state.config.max_steps
    if steps < LEAST_STEPS:
        raise ValueError(f"check_rollback: max_steps={steps} is too short; give at least {LEAST_STEPS}.")
    yield Train(0, _rates(state))
    if state.config.validation:
        yield Evaluate(steps)
    yield Done()


def _with_probes(probe_steps: int) -> Callable[[RunState], Plan]:
    def plan(state: RunState) -> Plan:
        config, rates = state.config, _rates(state)
        low, high = config.lr_range
        stops = [0, config.max_steps // 4, config.max_steps // 2, config.max_steps]
        for stage, (first, end) in enumerate(itertools.pairwise(stops)):
            yield Snapshot()
            for index, rate in enumerate((high, low)):
                evaluate = config.validation and index == 1
                yield Probe(stage, index, (rate,) * probe_steps, math.inf, evaluate, draw=index)
            yield Restore()
            if config.rewind:  # a chunk of the run that is taken back
                yield Snapshot()
                yield Train(first, (low,) * (end - first))
                yield Restore()
            yield Train(first, rates[first:end])
        if config.validation:
            yield Evaluate(config.max_steps)
        yield Done()

    return plan


@contextmanager
def _plan(plan: Callable[[RunState], Plan]) -> Iterator[list[RunState]]:
    """Put a plan in the place of the default one; yields the runs that it was asked for."""
    asked: list[RunState] = []

    def noted(state: RunState) -> Plan:
        asked.append(state)
        return plan(state)

    usual, PLANS["staged"] = PLANS["staged"], noted
    try:
        yield asked
    finally:
        PLANS["staged"] = usual
