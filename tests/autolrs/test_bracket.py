"""The bracket: which rates it probes, and that long probes settle what short ones get wrong."""

import math
from unittest.mock import patch

import pytest

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.plans import stage_search
from autolrs_plugin.core.plans.bracket import DOWN, LEAST_SHARE, MOST_FALL, UP, bracket_rates, fallen
from autolrs_plugin.core.plans.probing import Tried
from tests.autolrs.landscapes import Landscape, drive, regret

BEST = 3e-3


def tried(lr: float, loss: float, held: bool = True) -> Tried:
    losses = (loss,) * 10
    return Tried(lr, Probe(1, 0, (lr,) * 10, math.inf, False, 0), Result(losses=losses), held)


@pytest.mark.parametrize(
    ("done", "asked"),
    [
        ([], [1e-2]),
        ([tried(1e-2, 1.0)], [UP * 1e-2]),
        ([tried(1e-2, 1.0), tried(UP * 1e-2, 0.9)], [UP**2 * 1e-2]),
        ([tried(1e-2, 1.0), tried(UP * 1e-2, 1.1)], [DOWN * 1e-2]),
        ([tried(1e-2, 1.0), tried(UP * 1e-2, 9.0, held=False)], [DOWN * 1e-2]),
        ([tried(1e-2, 1.0), tried(UP * 1e-2, 1.1), tried(DOWN * 1e-2, 1.1)], []),
    ],
)
def test_the_third_probe_lies_on_the_side_where_the_loss_falls(done: list[Tried], asked: list[float]) -> None:
    assert bracket_rates(done, 1e-2, 1, 1e-6, 10.0) == pytest.approx(asked)


def test_where_the_present_rate_gains_nothing_it_looks_downwards_first() -> None:
    present = tried(1e-2, 1.0)
    assert bracket_rates([present], 1e-2, 1, 1e-6, 10.0, downwards=True) == pytest.approx([DOWN * 1e-2])
    for loss, third in ((0.9, DOWN**2 * 1e-2), (1.1, UP * 1e-2)):
        done = [present, tried(DOWN * 1e-2, loss)]
        assert bracket_rates(done, 1e-2, 1, 1e-6, 10.0) == pytest.approx([third])


def test_rates_outside_of_the_range_are_not_probed() -> None:
    assert bracket_rates([tried(1e-2, 1.0)], 1e-2, 1, 1e-6, 2e-2) == pytest.approx([DOWN * 1e-2])
    assert bracket_rates([tried(1e-2, 1.0)], 1e-2, 1, 5e-3, 2e-2) == []


def test_during_a_long_warm_up_the_present_rate_is_probed_below_the_range_as_well() -> None:
    config = AutoLRSConfig(max_steps=1000, lr_range=(1e-2, 10.0), prior_lr=2.5e-2, warmup=0.5)
    controller = Controller(config)
    drive(controller, Landscape(2.5e-2, speed=0.01))
    second = controller.stages[1]
    assert second.candidates[0].lr < 1e-2
    assert len(second.candidates) > 1
    if "no evidence" in second.reason:
        assert second.chosen_lr == 1e-2  # a decision is booked within the range
        assert max(controller.schedule.lrs) == pytest.approx(2.5e-2)


def test_probes_at_a_time_lie_on_both_sides() -> None:
    assert bracket_rates([], 1e-2, 3, 1e-6, 10.0) == pytest.approx([1e-2, UP * 1e-2, DOWN * 1e-2])


def test_the_rate_follows_a_fall_by_some_and_only_where_a_higher_one_was_looked_at() -> None:
    above = [1e-2, UP * 1e-2, DOWN * 1e-2]
    assert fallen(1e-2, 1e-2, above) == 0.0
    assert fallen(1.5e-2, 1e-2, above) == 0.0
    assert 0.0 < fallen(3e-2, 1e-2, above) < fallen(6e-2, 1e-2, above) < MOST_FALL
    assert fallen(1e3, 1e-2, above) == MOST_FALL
    assert fallen(1e3, 1e-2, [1e-2, DOWN * 1e-2]) == 0.0
    assert fallen(None, 1e-2, above) == 0.0


def worst(kind: type[Landscape], prior: float, **settings: float) -> float:
    """Return the worst regret of six runs."""
    regrets = []
    for seed in range(6):
        landscape = kind(BEST, seed=seed, **settings)
        config = AutoLRSConfig(max_steps=1000, lr_range=(1e-6, 10.0), prior_lr=prior, seed=seed)
        controller = Controller(config)
        drive(controller, landscape)
        assert controller.stages[1].first_step == 100
        regrets.append(regret(landscape, controller))
    return max(regrets)


def test_long_probes_tell_what_noise_hides_from_short_ones() -> None:
    settings = {"prior": BEST / 5, "speed": 0.005, "scatter": 0.15}
    assert worst(Landscape, **settings) < 0.008
    with patch.object(stage_search, "LEAST_SHARE", 1.0):
        assert worst(Landscape, **settings) > 0.012


class Falling(Landscape):
    """The best rate falls by one and a half decades over the first fifth: early probes find too high a one."""

    def shrinks(self, lr: float) -> float:
        return super().shrinks(lr * 10 ** (1.5 * (min(1.0, self.taken / 200) - 1)))


def test_a_best_rate_that_falls_from_stage_to_stage_is_followed_further() -> None:
    settings = {"prior": BEST, "speed": 0.01, "edge": 1e5}
    assert worst(Falling, **settings) < 0.012
    with patch.object(stage_search, "fallen", lambda *_: 0.0):
        assert worst(Falling, **settings) > 0.02


def test_probes_that_are_a_small_share_of_the_run_are_no_bracket() -> None:
    """They tell too little to move the rate by a small gain, either way."""
    config = AutoLRSConfig(max_steps=1000, lr_range=(1e-6, 10.0), prior_lr=BEST / 3, search_budget=0.1)
    controller = Controller(config)
    drive(controller, Landscape(BEST, speed=0.01))
    second = controller.stages[1]
    assert second.first_step == 100
    assert second.search_steps / len(second.candidates) < LEAST_SHARE * 1000
    assert second.candidates[1].lr / second.candidates[0].lr != pytest.approx(UP)
