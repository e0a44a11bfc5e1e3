"""Forecast against reality, chunk by chunk."""

import math

import numpy as np
import pytest

from autolrs_plugin.core.plans.watch import FELL, FINE, LOST, RISEN, STALLED, Watch, summary


def noisy(level: float, steps: int = 25, scatter: float = 0.02) -> list[float]:
    # Noise by its level, so that no test depends on those before it.
    rng = np.random.default_rng([round(1e4 * level), steps])
    return [float(v) for v in level + scatter * rng.standard_normal(steps)]


def watching(levels: list[float], scatter: float = 0.02) -> Watch:
    watch = Watch(first_loss=2.0, above=4.0)
    for i, level in enumerate(levels):
        watch.take(noisy(level, scatter=scatter), 25 * (i + 1))
    return watch


FALLING = [1.0, 0.9, 0.84, 0.8, 0.77]


@pytest.mark.parametrize(
    ("level", "found"), [(0.745, FINE), (0.78, FINE), (1.1, RISEN), (5.0, LOST), (0.2, FELL)]
)
def test_a_chunk_is_judged_against_those_before(level: float, found: str) -> None:
    assert watching(FALLING).judge(noisy(level), 150) == found


def test_worse_than_untrained_is_no_fine_beginning() -> None:
    assert watching([]).judge(noisy(2.5), 25) == RISEN
    assert watching([]).judge(noisy(2.02), 25) == FINE
    assert watching(FALLING).judge(noisy(0.75), 150) == FINE
    changed = watching(FALLING)
    changed.begin_anew(noisy(3.0))
    assert changed.judge(noisy(2.8), 175) == FINE
    assert changed.judge(noisy(3.5), 175) == RISEN


def test_another_run_has_another_scale() -> None:
    """It never becomes smaller: the untrained loss is no explosion."""
    changed = watching(FALLING)
    changed.begin_anew(noisy(6.0))
    assert changed.judge(noisy(6.0), 175) == FINE
    assert changed.above == pytest.approx(12.0, rel=0.05)
    changed.begin_anew(noisy(1.0))
    assert changed.above == pytest.approx(12.0, rel=0.05)


@pytest.mark.parametrize(
    ("losses", "grows"),
    [
        ([0.7] * 5 + [5.0] * 20, False),
        ([9.0 - 0.1 * t for t in range(25)], False),
        ([0.7 * 1.5**t for t in range(25)], True),
        ([10.0, 200.0, 10.0] * 8, True),
        ([5.0] * 15 + [math.nan] * 10, True),
        ([math.nan] * 25, True),
    ],
)
def test_a_lost_chunk_grows_or_stays_where_it_is(losses: list[float], grows: bool) -> None:
    watch = watching(FALLING)
    assert watch.judge(losses, 150) == LOST
    assert watch.grows(losses) == grows


def test_a_new_rate_may_not_lose_most_of_what_was_gained() -> None:
    """Losses may rise for a while at another rate; twice as far from the lowest level as that is from the first."""
    moved = watching(FALLING)
    moved.forget()
    assert moved.judge(noisy(1.3), 150) == FINE
    assert moved.judge(noisy(1.5), 150) == RISEN
    changed = watching(FALLING)
    changed.begin_anew(noisy(1.4))
    assert changed.judge(noisy(1.4), 150) == FINE


def test_what_few_losses_tell_is_not_relied_on() -> None:
    """How much losses scatter is learnt chunk by chunk."""
    watch, calm = Watch(first_loss=1.0), [1.0, 1.02, 0.98, 1.0, 1.02, 0.98, 1.0]
    watch.take(calm, 7)
    assert watch.judge([1.15] * 3, 10) == FINE
    assert watch.judge([1.15], 8) == FINE
    for end in range(14, 63, 7):
        watch.take(calm, end)
    assert watch.judge([1.15] * 3, 66) == RISEN


def test_one_loss_takes_nothing_back_where_noise_is_unknown() -> None:
    watch = Watch(first_loss=1.0)
    watch.take([1.0], 1)
    assert watch.judge([1.5], 2) == FINE
    assert watch.judge([1.5, 1.6, 1.4, 1.5], 5) == FINE
    assert watch.judge(noisy(1.5), 26) == RISEN


def test_a_stall_is_told_from_noise() -> None:
    steep = [2.0, 1.6, 1.37, 1.2, 1.07, 0.97]
    assert watching(steep).judge(noisy(1.05), 175) == STALLED
    assert watching(steep, scatter=0.5).judge(noisy(1.05, scatter=0.5), 175) == FINE


def test_a_spike_that_stays_does_not_hide_behind_its_own_scatter() -> None:
    swinging = [3.0 if i % 2 else 0.6 for i in range(25)]
    assert watching(FALLING).judge(swinging, 150) == RISEN
    once = noisy(0.75)
    once[10] = 9.0
    assert watching(FALLING).judge(once, 150) == FINE


def test_outliers_are_no_rise_and_no_explosion() -> None:
    """Nor do they hide one: they are told by the scatter seen so far."""
    watch, two = watching(FALLING), noisy(0.75)
    two[15] = two[20] = 900.0
    assert watch.judge(two, 150) == FINE
    watch.take(two, 150)
    assert watch.recent[-1].scatter < 0.03
    assert watch.judge([*noisy(0.75, 24), 900.0], 175) == FINE
    assert watch.judge([*noisy(0.75, 20), *[50.0] * 5], 175) == RISEN  # no explosion: it came back from more
    assert watch.judge([*noisy(0.75, 15), *[9000.0] * 10], 175) == LOST


def test_a_chunk_that_ends_high_is_told_by_the_next_one() -> None:
    watch = watching(FALLING)
    watch.take([*noisy(0.75, 23), 1.2, 1.9], 150)
    assert watch.unsettled
    watch.back_to(125)
    assert not watch.unsettled
    assert [c.end for c in watch.chunks] == [25, 50, 75, 100, 125]
    watch.take(noisy(0.75), 150)
    assert not watch.unsettled


def test_losses_that_are_not_finite() -> None:
    one = noisy(0.75)
    one[20] = math.nan
    assert watching(FALLING).judge(one, 150) == FINE
    assert watching(FALLING).judge([*noisy(0.75, 15), *[math.nan] * 10], 150) == LOST
    assert watching(FALLING).judge([math.inf] * 25, 150) == LOST
    assert summary([math.nan], 1) is None


def test_the_forecast_is_a_line_over_the_logarithm_of_the_step() -> None:
    watch = Watch(first_loss=2.0)
    for end in (100, 200, 300, 400, 500):
        watch.take([2.0 - 0.2 * math.log(end)] * 20, end)
    predicted, std = watch.forecast(1000)
    assert predicted == pytest.approx(2.0 - 0.2 * math.log(1000), abs=1e-9)
    assert std == pytest.approx(0.0, abs=1e-9)
    watch.forget()
    assert watch.forecast(1000) == (math.inf, math.inf)


def test_flat_is_a_plateau_and_not_noise_that_would_hide_a_gain() -> None:
    assert watching([2.0] * 12).flat(700)
    assert not watching([1.5] * 12).flat(700)  # what was gained before is no plateau's
    assert not watching([2.0] * 3).flat(800)
    assert not watching([2.0, 1.9, 1.8, 1.7, 1.6, 1.5]).flat(800)
    assert not watching([2.0, 1.97, 1.94, 1.91, 1.88, 1.85], scatter=1.0).flat(800)
    assert watching([3.0] * 24, scatter=0.1).flat(130)
    assert not watching([3.0] * 24, scatter=0.6).flat(130)  # a rise would be seen too late
