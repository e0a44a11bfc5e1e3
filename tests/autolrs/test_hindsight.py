"""What a run teaches the next one of its kind, beside the rates that it took."""

import numpy as np
import pytest

from autolrs_plugin.core.actions import Action, Evaluate, Restore, Snapshot, Train
from autolrs_plugin.core.hindsight import retreats, with_retreats, without_plateau

STEPS, CHUNK = 800, 20
NOISE = np.random.default_rng(0).standard_normal(STEPS)


def losses(plateau: int, scatter: float = 0.01) -> list[float]:
    """Return losses that stay as they are at first, and then fall."""
    steps = np.arange(STEPS)
    return [float(v) for v in 2.3 * np.exp(-np.maximum(0, steps - plateau) / 200) + scatter * NOISE]


def test_a_run_begins_with_the_rate_at_which_something_was_gained() -> None:
    points = [(0, 1e-3), (280, 1.5e-3), (300, 0.06), (430, 0.024)]
    assert without_plateau(points, losses(300), CHUNK, STEPS) == [(0, 0.06), (430, 0.024)]


@pytest.mark.parametrize(("plateau", "scatter"), [(0, 0.01), (0, 0.5), (300, 0.5)])
def test_without_a_plain_plateau_all_points_stay(plateau: int, scatter: float) -> None:
    points = [(0, 1e-3), (30, 1.5e-3), (300, 0.06)]
    assert without_plateau(points, losses(plateau, scatter), CHUNK, STEPS) == points


@pytest.mark.parametrize("scatter", [0.0, 0.01])
def test_a_run_that_never_gained_anything_is_followed_as_it_was(scatter: float) -> None:
    points = [(0, 1e-3), (280, 1.5e-3), (300, 0.06)]
    assert without_plateau(points, losses(STEPS, scatter), CHUNK, STEPS) == points


def trained(*chunks: tuple[int, float] | Action) -> list[Action]:
    """Return actions: a chunk is (first step, rate)."""
    return [Train(c[0], (c[1],) * CHUNK) if isinstance(c, tuple) else c for c in chunks]


def test_a_rate_that_a_retreat_ended_is_replaced_by_the_lower_one() -> None:
    actions = trained(
        (0, 0.1), Snapshot(), (20, 0.1), (40, 0.1), Restore(), (40, 0.04), Evaluate(60), (60, 0.04)
    )
    assert [train.first_step for train in retreats(actions)] == [40]
    points = [(0, 0.1), (40, 0.04), (200, 0.02)]
    assert with_retreats(points, actions, losses(0)) == [(0, 0.04), (200, 0.02)]
    assert with_retreats(points, [*actions[:3], *actions[6:]], losses(0)) == points


def test_a_lower_rate_that_mended_nothing_says_nothing_of_the_one_before() -> None:
    actions = trained((0, 0.1), Snapshot(), (20, 0.1), (40, 0.1), Restore(), (40, 0.04))
    changed = losses(0)
    changed[40:] = [loss + 2.0 for loss in changed[40:]]
    points = [(0, 0.1), (40, 0.04)]
    assert with_retreats(points, actions, changed) == points
    assert with_retreats(points, actions, losses(0)) == [(0, 0.04)]


def test_a_way_back_from_probes_is_no_retreat() -> None:
    actions = trained((0, 0.1), Snapshot(), Restore(), (20, 0.1), Restore(), (20, 0.1), Snapshot(), Restore())
    assert [train.first_step for train in retreats(actions)] == [20]
