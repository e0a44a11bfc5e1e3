"""Forecasts are right about as often as they say, and every curve has its stated answer."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_plugin.core.forecast import MOST_POINTS, SHORT, forecast

Curve = Callable[[np.ndarray], np.ndarray]


def exponential(rng: np.random.Generator, n: int) -> Curve:
    a, c, scale = rng.uniform(0.5, 3), rng.uniform(0.1, 1.5), rng.uniform(n / 10, n)
    return lambda t: a * np.exp(-t / scale) + c


def power_law(rng: np.random.Generator, n: int) -> Curve:
    a, c, p = rng.uniform(0.5, 3), rng.uniform(0.1, 1.5), rng.uniform(0.2, 1.2)
    return lambda t: a * (1.0 + t) ** -p + c


@pytest.mark.parametrize("family", [exponential, power_law])
@pytest.mark.parametrize(("steps", "noise", "ahead"), [(30, 0.05, 3), (80, 0.02, 10), (200, 0.02, 10)])
def test_it_is_right_as_often_as_it_says(
    family: Callable[[np.random.Generator, int], Curve], steps: int, noise: float, ahead: int
) -> None:
    """A normal error lies within one standard deviation in 68% of all cases and within three almost always."""
    rng = np.random.default_rng([steps, ahead])
    z, errors, naive = [], [], []
    for _ in range(60):
        curve = family(rng, steps)
        losses = curve(np.arange(steps)) + noise * rng.standard_normal(steps)
        found, truth = forecast(losses.tolist(), ahead * steps), float(curve(np.array([ahead * steps]))[0])
        z.append(abs(found.loss - truth) / found.std)
        errors.append(abs(found.loss - truth))
        naive.append(abs(losses[-max(2, steps // 10) :].mean() - truth))
    within = [float(np.mean(np.array(z) < k)) for k in (1, 2, 3)]
    assert within[0] >= 0.55
    assert within[1] >= 0.85
    assert within[2] >= 0.9
    assert np.median(z) > 0.15  # and it does not say "anything" either
    assert np.median(errors) < np.median(naive)  # looking ahead beats the last level


@pytest.mark.parametrize("family", [exponential, power_law])
@pytest.mark.parametrize("steps", [40, MOST_POINTS * 8])
def test_without_noise_it_is_exact(family: Callable[[np.random.Generator, int], Curve], steps: int) -> None:
    """Also where many steps are averaged into one point."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        curve = family(rng, steps)
        losses = curve(np.arange(steps))
        found, truth = forecast(losses.tolist(), 3 * steps), float(curve(np.array([3 * steps]))[0])
        assert found.model == ("exponential" if family is exponential else "power")
        assert found.loss == pytest.approx(truth, abs=0.01 * np.ptp(losses))


def test_an_outlier_does_not_matter() -> None:
    t = np.arange(60)
    losses = np.exp(-t / 20) + 0.5 + 0.01 * np.random.default_rng(0).standard_normal(60)
    clean = forecast(losses.tolist(), 200)
    losses[50] += 5.0
    spiked = forecast(losses.tolist(), 200)
    assert spiked.loss == pytest.approx(clean.loss, abs=0.05)


def test_it_never_predicts_what_cannot_be() -> None:
    """Noise that looks like a steep fall: the least squares of the paper would say a loss below zero."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        losses = 1.0 - 0.005 * np.arange(20) + 0.1 * rng.standard_normal(20)
        assert forecast(losses.tolist(), 1000).loss >= 0
        # A curve that goes below zero (a reward, a log-likelihood) has a floor as well, and one may be given.
        assert forecast((losses - 2).tolist(), 1000).loss >= (losses - 2).min() - np.ptp(losses - 2)
        assert forecast(losses.tolist(), 1000, floor=0.6).loss >= 0.6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_value_that_is_not_finite_means_divergence(bad: float, position: int) -> None:
    losses = [2.0 - 0.01 * i for i in range(20)]
    losses[position] = bad
    found = forecast(losses, 100)
    assert (found.loss, found.std, found.model, found.diverged) == (math.inf, 0.0, "diverged", True)


@pytest.mark.parametrize("value", [0.0, -3.5, 1.0, 1e-30, 1e90])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_a_constant_stays(value: float, count: int) -> None:
    found = forecast([value] * count, 1000)
    assert (found.loss, found.std, found.model) == (value, 0.0, "constant")


def test_a_rising_curve_stays_at_its_level_and_is_doubtful() -> None:
    losses = (1.0 + 0.01 * np.arange(50) + 0.01 * np.random.default_rng(0).standard_normal(50)).tolist()
    found = forecast(losses, 1000)
    assert found.model == "rising"
    assert found.loss == pytest.approx(1.44, abs=0.02)
    assert found.std > 0.25  # the rise itself
    assert not found.diverged


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_an_exploding_curve_has_diverged(rate: float) -> None:
    losses = (2.0 + np.exp(rate * np.arange(30))).tolist()
    assert forecast(losses, 100).diverged


def test_a_very_short_curve_is_not_fitted() -> None:
    losses = [2.0, 1.8, 1.5, 1.4]
    found = forecast(losses, 1000)
    assert found.model == "short"
    assert found.loss == pytest.approx(1.45)
    assert found.std > 0
    assert forecast([*losses, 1.3, 1.2, 1.1, 1.0][:SHORT], 1000).model in ("exponential", "power")
    with pytest.raises(ValueError, match=r"losses=\[\]: there is nothing to forecast from"):
        forecast([], 10)


def test_it_is_doubtful_by_the_scale_of_the_curve() -> None:
    """The same curve in other units is the same forecast in other units."""
    rng = np.random.default_rng(0)
    losses = np.exp(-np.arange(60) / 20) + 0.5 + 0.02 * rng.standard_normal(60)
    one = forecast(losses.tolist(), 200)
    for scale in (1e-4, 1e4):
        other = forecast((losses * scale).tolist(), 200)
        assert other.model == one.model
        assert other.loss == pytest.approx(one.loss * scale, rel=0.01)
        assert other.std == pytest.approx(one.std * scale, rel=0.1)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=80)
    | st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=80)
    | st.lists(st.floats(1e-3, 10), min_size=8, max_size=80),
    tau=st.floats(0, 1e6),
)
def test_it_never_fails(losses: list[float], tau: float) -> None:
    found = forecast(losses, tau)
    assert not math.isnan(found.loss)
    assert found.loss > -math.inf
    assert 0 <= found.std < math.inf
    assert found.diverged == (found.model == "diverged")
    if not all(map(math.isfinite, losses)):
        assert found.diverged
    elif not found.diverged:
        spread = max(losses) - min(losses)
        assert min(losses) - 1.001 * spread - 1e-9 <= found.loss <= max(losses) + 2.001 * spread + 1e-6
