"""Following: the points of an earlier run at which a warm-started one takes its rate."""

from collections.abc import Sequence

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.schedule import ramp_steps

Marks = list[tuple[int, int]]
"""A step, and which point or planned stage is due at it."""


def points_ahead(config: AutoLRSConfig) -> Marks:
    """Return when this run takes the rates of the earlier one: where that had settled at a rate, this one does, too."""
    ramp = ramp_steps(config) - 1
    points = config.warm_start or ()
    return [(max(min(i, 1), round(at * config.max_steps) - ramp), i) for i, (at, _) in enumerate(points)]


def below(rate: float, ahead: Marks, points: Sequence[tuple[float, float]]) -> Marks:
    """Return what is ahead without all points that are no lower than a rate, up to the earlier run's next rise."""
    for k, (_, i) in enumerate(ahead):
        if points[i][1] < rate or (i and points[i][1] > points[i - 1][1]):
            return ahead[k:]
    return []
