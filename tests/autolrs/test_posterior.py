"""The posterior over rate and progress, and the evidence test, on shortfalls with known answers."""

import math

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from autolrs_plugin.core.posterior import AMPLITUDE, COLD, DOWN, PROGRESS_LENGTH, UP, RatePosterior, Seen

LOW, HIGH = 1e-5, 1.0


def seen(shortfalls: dict[float, float], std: float = 0.02, progress: float = 0.3) -> list[Seen]:
    return [Seen(math.log10(lr), progress, shortfall, std) for lr, shortfall in shortfalls.items()]


def posterior(
    told: list[Seen], present: float = 1e-2, progress: float = 0.3, width: float = 0.5
) -> RatePosterior:
    return RatePosterior(present, width, progress, told, LOW, HIGH)


def held(*lrs: float) -> list[float]:
    return [math.log10(lr) for lr in lrs]


def test_the_mean_goes_through_what_was_seen_and_the_doubt_grows_away_from_it() -> None:
    mean, covariance = posterior(seen({1e-2: 0.6, 3e-2: 0.0})).predict(np.array(held(1e-2, 3e-2)))
    assert mean == pytest.approx([0.6, 0.0], abs=0.06)
    _, far = posterior(seen({1e-2: 0.6, 3e-2: 0.0})).predict(posterior([]).grid[:1])
    assert far[0, 0] > 10 * covariance[0, 0]


def test_it_is_the_process_that_scikit_learn_fits() -> None:
    told = [*seen({1e-3: 0.6, 1e-2: 0.0}, 0.1, 0.1), *seen({1e-2: 0.4, 3e-2: 0.0, 2e-1: 1.2}, 0.05)]
    ours = posterior(told)
    kernel = ConstantKernel(AMPLITUDE**2) * Matern((0.5, PROGRESS_LENGTH), nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=np.square([s.std for s in told]), optimizer=None)
    x = np.array([s.x for s in told])
    at_prior = posterior([]).predict(x)[0]
    theirs.fit(np.array([[s.x, s.progress] for s in told]), [s.shortfall for s in told] - at_prior)
    points = np.column_stack([ours.grid, np.full(len(ours.grid), 0.3)])
    mean, covariance = theirs.predict(points, return_cov=True)
    assert ours.predict(ours.grid)[0] == pytest.approx(mean + posterior([]).predict(ours.grid)[0])
    assert ours.predict(ours.grid)[1] == pytest.approx(covariance, abs=1e-9)


@pytest.mark.parametrize(
    ("other", "gain", "progress", "moves"),
    [
        (3e-2, UP[1] + 0.15, 0.3, True),
        (3e-2, UP[1] - 0.04, 0.3, False),
        (3e-3, COLD[1] + 0.1, 0.3, False),
        (3e-3, DOWN[1] + 0.2, 0.3, True),
        (3e-2, COLD[1] + 0.25, 0.0, True),
        (3e-2, UP[1] + 0.04, 0.0, False),
    ],
)
def test_a_move_needs_its_margin(other: float, gain: float, progress: float, moves: bool) -> None:
    told = seen({1e-2: gain, other: 0.0}, progress=progress)
    verdict = posterior(told, progress=progress).decide(held(1e-2, other))
    assert verdict.moved == moves
    assert (verdict.lr == 1e-2) == (not moves)
    if moves:
        assert verdict.lr == pytest.approx(other, rel=0.3 if progress else 0.2)


def test_a_small_gain_is_followed_a_little_way_only() -> None:
    rates = held(1e-2, 3e-2, 1e-1)
    small, large = (
        posterior(seen({1e-2: gain, 3e-2: gain / 10, 1e-1: 0.0})).decide(rates) for gain in (0.12, 0.6)
    )
    assert small.moved
    assert large.moved
    assert 1e-2 < small.lr < 3e-2 < large.lr


def test_noise_keeps_the_present_rate_and_more_of_it_never_moves_more() -> None:
    moved = [
        posterior(seen({1e-2: 0.9, 3e-2: 0.0}, std)).decide(held(1e-2, 3e-2)).moved
        for std in (0.01, 0.1, 0.5, 3.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0]
    assert not moved[-1]


def test_where_both_are_even_it_goes_down_as_easily_as_it_began() -> None:
    told = seen({1e-2: 0.3, 3e-3: 0.0})
    assert not posterior(told).decide(held(1e-2, 3e-3)).moved
    assert posterior(told).decide(held(1e-2, 3e-3), even=True).moved
    assert posterior(told).decide(held(3e-3, 1e-2), must_move=True).moved


def test_nothing_is_decided_for_outside_of_what_held() -> None:
    told = seen({1e-3: 1.0, 1e-2: 0.5, 3e-2: 0.0})
    assert posterior(told).decide(held(1e-3, 1e-2)).lr <= 1e-2 * 1.001


def test_the_interval_holds_the_best_and_grows_with_the_noise() -> None:
    told = {1e-3: 0.8, 1e-2: 0.0, 1e-1: 0.9}
    sure, unsure = (posterior(seen(told, std)).decide(held(*told)) for std in (0.02, 1.0))
    assert sure.low <= 1e-2 <= sure.high
    assert sure.low > 1e-3
    assert sure.high < 0.1
    assert unsure.high / unsure.low > sure.high / sure.low


def test_it_asks_upwards_first_and_only_for_what_could_be_accepted() -> None:
    lr, hope = posterior(seen({1e-2: 0.0})).ask(held(1e-2))
    assert lr > 1e-2
    assert posterior(seen({1e-2: 0.0, 2e-2: 1.5, 4e-2: 1.8})).ask(held(1e-2, 2e-2, 4e-2))[0] < 1e-2
    assert posterior(seen({1e-2: 0.0})).ask(held(1e-2), free=True)[1] > hope
    apart = posterior([]).ask(held(1e-2, 3e-2))[0]
    assert all(abs(math.log10(apart / lr)) >= 0.12 for lr in (1e-2, 3e-2))


def test_earlier_stages_count_the_less_the_longer_ago() -> None:
    def doubt(ago: float) -> float:
        told = seen({1e-2: 0.5, 3e-2: 0.0}, progress=0.8 - ago)
        _, covariance = posterior(told, progress=0.8).predict(posterior([]).grid[:1] * 0 + math.log10(3e-2))
        return float(covariance[0, 0])

    assert doubt(0.0) < doubt(0.2) < doubt(0.6)
