"""The part of a plan that trains: chunk by chunk, with a way back where a chunk diverges."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from autolrs_plugin.core.actions import Evaluate, Restore, Snapshot, Train
from autolrs_plugin.core.state import Plan, RunState

CHUNKS = 20
"""About the number of pieces that a run is trained in: a killed job repeats one of them at most."""

DIVERGED_FACTOR = 2.0
"""A loss this many times above the first one (in its scale) has diverged."""

RETREAT = 0.5
"""After a divergence the learning rate continues at this share."""


def diverged_above(first_loss: float) -> float:
    """Return the loss above which a run that began with `first_loss` has diverged; infinite if that is none."""
    if not math.isfinite(first_loss):
        return math.inf
    return first_loss + (DIVERGED_FACTOR - 1.0) * max(abs(first_loss), 1e-3)


def has_diverged(losses: Sequence[float], above: float) -> bool:
    """Tell whether a piece of training ended on losses that are not finite, or mostly above `above`."""
    values = np.asarray(losses, dtype=float)
    if not np.isfinite(values).all():
        return True
    return bool(np.median(values[-max(1, len(values) // 4) :]) > above)


def evaluation_steps(state: RunState) -> list[int]:
    """Return the real steps after which the run is evaluated: evenly spread, the last one at the end."""
    if not state.config.validation:
        return []
    count = min(state.config.evaluations, state.config.max_steps)
    return [round((i + 1) * state.config.max_steps / count) for i in range(count)]


def train(state: RunState, lr_at: Callable[[int], float], stop: int, above: float = math.inf) -> Plan:
    """Train up to the real step `stop`, and evaluate where that is due.

    A chunk that diverges is taken back and repeated at a lower rate, as long as what that throws away fits into
    what is left of the search budget; after that, training only goes on. Where the run's own steps cannot be taken
    back (`rewind`), what comes after such a chunk is trained at a lower rate.

    Args:
        lr_at: the learning rate of a real step.
        above: a loss above this has diverged; by default nothing is taken back.
    """
    marks = evaluation_steps(state)
    scale = 1.0
    while state.step < stop:
        first = state.step
        end = min([stop, first + chunk_steps(state), *[m for m in marks if m > first]])
        may_retreat = state.config.rewind and math.isfinite(above) and end - first <= state.budget_left_steps
        if may_retreat:
            yield Snapshot()
        result = yield Train(first, tuple(scale * lr_at(t) for t in range(first, end)))
        if has_diverged(result.losses, above):
            if may_retreat:
                yield Restore()
                scale *= RETREAT
                continue
            if not state.config.rewind:
                scale *= RETREAT
        if end in marks:
            yield Evaluate(end)


def chunk_steps(state: RunState) -> int:
    """Return the most steps that are trained at once, and taken back at once where they diverge."""
    return math.ceil(state.config.max_steps / CHUNKS)
