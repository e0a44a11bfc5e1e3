"""Hindsight: what a run teaches the next one of its kind, beside the rates that it took.

plateau   As long as nothing was gained, the rates were no good, whatever they were: the next run begins with the
          one that was there when something was gained.
retreat   A chunk that rose, was taken back, and did not rise again at a lower rate: the rate before had been too
          high for some time, and cost what it had gained. The next run takes the lower one from the beginning of
          that rate on.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

from autolrs_plugin.core.actions import Action, Restore, Train
from autolrs_plugin.core.plans.watch import LOST, RISEN, Watch

SAME = 0.05
"""Rates that differ by less than this share of them are one."""

Points: TypeAlias = Sequence[tuple[int, float]]
"""(step, rate) wherever a plateau changed, from step 0 on."""


def without_plateau(points: Points, losses: Sequence[float], chunk_steps: int, max_steps: int) -> Points:
    """Return the points without those at which nothing was gained, before anything was."""
    watch, gained_by = Watch(), 0
    for end in range(chunk_steps, len(losses) + 1, chunk_steps):
        watch.take(losses[end - chunk_steps : end], end)
        if watch.flat(max_steps - end):
            gained_by = end + chunk_steps
    passed = [rate for step, rate in points if step < gained_by]
    return [(0, passed[-1]), *points[len(passed) :]] if passed and watch.gained else points


def with_retreats(points: Points, actions: Sequence[Action], losses: Sequence[float]) -> Points:
    """Return the points with the rate of each one that a retreat ended replaced by that which it retreated to.

    Args:
        points: as they were.
        actions: all actions of the run, in order.
        losses: of the steps that were kept.
    """
    mended = [train for train in retreats(actions) if _held(train, losses)]
    after = []
    for (step, rate), (until, lower) in zip(points, [*points[1:], (len(losses), math.inf)], strict=True):
        ended = any(train.first_step <= until < train.first_step + len(train.lrs) for train in mended)
        after.append((step, lower if ended and lower < rate else rate))
    return [p for i, p in enumerate(after) if not i or not math.isclose(p[1], after[i - 1][1], rel_tol=SAME)]


def retreats(actions: Sequence[Action]) -> list[Train]:
    """Return the chunks that stayed, of those that were trained again after they had been taken back."""
    kept: dict[int, Train] = {}
    again: set[int] = set()
    last: Action | None = None
    for action in actions:
        if isinstance(action, Restore) and isinstance(last, Train):
            again.add(last.first_step)
            kept.pop(last.first_step)
        elif isinstance(action, Train):
            kept[action.first_step] = action
        last = action
    return [train for step, train in kept.items() if step in again]


def _held(train: Train, losses: Sequence[float]) -> bool:
    """Tell whether a chunk that was trained again did not rise again, judged by those before it."""
    count, watch = len(train.lrs), Watch()
    for end in range(count, train.first_step + 1, count):
        watch.take(losses[end - count : end], end)
    end = train.first_step + count
    return watch.judge(losses[train.first_step : end], end) not in (RISEN, LOST)
