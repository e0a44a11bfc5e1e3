"""The search asks where its losses send it, whatever their scale; divergence is a ceiling and no number."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor

from autolrs_plugin.core.search import LRSearch, fit_process

LOW, HIGH = 1e-5, 1.0
Loss = Callable[[float], float]


def valley(best: float) -> Loss:
    """A loss with its minimum at `best`, one higher per two decades squared."""
    return lambda lr: 1.0 + 0.25 * math.log10(lr / best) ** 2


def played(loss: Loss, probes: int = 8, kappa: float | None = None, std: float = 0.0) -> LRSearch:
    search = LRSearch(LOW, HIGH, kappa)
    for _ in range(probes):
        lr = search.ask()[0]
        search.tell(lr, loss(lr), std)
    return search


def asked(search: LRSearch) -> list[float]:
    return [o.lr for o in search.observations]


@pytest.mark.parametrize("kappa", [None, 1.96])
def test_probes_for_f_and_for_minus_f_differ(kappa: float | None) -> None:
    """The reference's kappa of a million asks for the same rates whatever the losses are."""
    f = valley(1e-3)
    down, up = asked(played(f, kappa=kappa)), asked(played(lambda lr: -f(lr), kappa=kappa))
    assert down[0] == up[0]  # nothing is known yet
    late = [np.log10(lrs[3:]) for lrs in (down, up)]
    assert np.median(np.abs(late[0] + 3)) < 0.5  # near the minimum
    assert np.median(np.abs(late[1] + 3)) > 1.5  # at the ends
    inert = np.log10(asked(played(f, kappa=1e6))[3:])
    assert np.median(np.abs(inert + 3)) > 1.0  # what we do not want, and would see


@pytest.mark.parametrize("best", [3e-5, 1e-3, 0.1])
def test_it_finds_the_minimum(best: float) -> None:
    decision = played(valley(best)).decide()
    assert abs(math.log10(decision.lr / best)) < 0.2
    assert decision.loss == pytest.approx(1.0, abs=0.05)


def test_it_finds_it_under_noise() -> None:
    missed = []
    for seed in range(8):
        rng, search = np.random.default_rng(seed), LRSearch(LOW, HIGH)
        for _ in range(12):
            lr = search.ask()[0]
            search.tell(lr, valley(1e-2)(lr) + 0.1 * rng.standard_normal(), 0.1)
        missed.append(abs(math.log10(search.decide().lr / 1e-2)))
    assert np.median(missed) < 0.4
    assert max(missed) < 1.5


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (3.0, 7.0), (1.0, -1e4)])
def test_the_unit_of_the_loss_does_not_matter(scale: float, shift: float) -> None:
    f = valley(2e-3)

    def diverging(lr: float) -> float:
        return math.inf if lr > 0.1 else f(lr)

    one, other = (
        played(g, std=s)
        for g, s in ((diverging, 0.01), (lambda lr: diverging(lr) * scale + shift, 0.01 * scale))
    )
    assert asked(other) == pytest.approx(asked(one), rel=0.05)
    decisions = one.decide(), other.decide()
    assert decisions[1].lr == pytest.approx(decisions[0].lr, rel=0.05)
    assert decisions[1].loss == pytest.approx(decisions[0].loss * scale + shift, rel=1e-3, abs=0.01 * scale)
    assert decisions[1].std == pytest.approx(decisions[0].std * scale, rel=0.1)


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf, 1e300])
def test_what_diverged_is_a_ceiling(bad: float) -> None:
    """Nothing at or above it is asked or decided for; the losses below are judged as if it had not been told."""
    search, without = LRSearch(LOW, HIGH), LRSearch(LOW, HIGH)
    for lr in (1e-4, 1e-3, 1e-2):
        search.tell(lr, valley(1e-3)(lr))
        without.tell(lr, valley(1e-3)(lr))
    search.tell(0.1, bad, math.nan if math.isnan(bad) else 5.0)
    assert search.ceiling == 0.1
    assert search.grid.max() < 0.1
    assert all(lr < 0.1 for lr in search.ask(3))
    rates = [1e-4, 5e-4, 1e-2]
    assert np.allclose(search.posterior(rates), without.posterior(rates))
    search.tell(1e-2, math.inf)  # a lower one: what held there once no longer counts for the grid
    assert search.grid.max() < 1e-2


def test_where_everything_diverged_it_goes_down() -> None:
    search = LRSearch(LOW, HIGH)
    lowest = HIGH
    for _ in range(4):
        lr = search.ask()[0]
        assert LOW <= lr < lowest
        search.tell(lr, math.inf)
        lowest = lr
    decision = search.decide()
    assert LOW <= decision.lr < lowest
    assert math.isinf(decision.loss)
    search.tell(LOW, math.inf)  # even the least rate
    assert all(math.isfinite(lr) and lr >= LOW for lr in [*search.ask(3), search.decide().lr])


@pytest.mark.parametrize("told", [0, 1, 5])
def test_rates_that_are_asked_for_at_once_are_distinct(told: int) -> None:
    search = played(valley(1e-3), probes=told)
    rates = search.ask(4)
    assert len(rates) == 4
    distances = np.diff(np.sort(np.log10(rates)))
    assert distances.min() >= 0.1
    assert all(LOW <= lr <= HIGH for lr in rates)
    assert len(search.observations) == told  # asking tells nothing
    narrow = LRSearch(1e-3, 1.0001e-3)
    narrow.tell(1e-3, 1.0)
    assert len({*narrow.ask(5)}) == 5


def test_a_batch_is_worth_nearly_as_much_as_one_by_one() -> None:
    search = LRSearch(LOW, HIGH)
    for _ in range(3):
        for lr in search.ask(3):
            search.tell(lr, valley(0.03)(lr))
    assert abs(math.log10(search.decide().lr / 0.03)) < 0.2


def test_a_fit_that_fails_falls_back_in_steps_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fits = GaussianProcessRegressor.fit, []

    def failing(times: int) -> Callable[..., Any]:
        def fit(self: GaussianProcessRegressor, x: Any, y: Any) -> Any:
            fits.append(self.kernel)
            if len(fits) <= times:
                raise np.linalg.LinAlgError("not positive definite")
            return real(self, x, y)

        return fit

    x, y, noise = np.array([[-4.0], [-3.0], [-2.0]]), np.array([1.0, 0.0, 1.0]), np.full(3, 0.01)
    for times in (1, 2):
        fits.clear()
        monkeypatch.setattr(GaussianProcessRegressor, "fit", failing(times))
        with pytest.warns(
            UserWarning, match="could not be fitted .not positive definite.; trying a simpler"
        ) as seen:
            process = fit_process(x, y, noise)
        assert len(seen) == times
        assert np.isfinite(process.predict(x)).all()
    search = LRSearch(LOW, HIGH)
    fits.clear()
    for lr in (1e-4, 1e-3, 1e-2):
        search.tell(lr, valley(1e-3)(lr))
    with pytest.warns(UserWarning, match="could not be fitted"):
        assert search.decide().lr == pytest.approx(1e-3, rel=1.0)  # and the run goes on
    fits.clear()
    monkeypatch.setattr(GaussianProcessRegressor, "fit", failing(99))
    with (
        pytest.warns(UserWarning, match="could not be fitted"),
        pytest.raises(ValueError, match="cannot be fitted by any Gaussian process"),
    ):
        fit_process(x, y, noise)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (1.0, 0.1), (0.1, 0.1), (-1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)]
)
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must be a range of positive learning rates"):
        LRSearch(low, high)


def test_with_nothing_told_there_is_no_posterior() -> None:
    with pytest.raises(ValueError, match="no finite loss has been told"):
        LRSearch(LOW, HIGH).posterior([0.1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    told=st.lists(st.tuples(st.floats(-5, 0), st.floats(), st.floats(0, 10)), max_size=8),
    count=st.integers(1, 3),
)
def test_it_never_fails(told: list[tuple[float, float, float]], count: int) -> None:
    """Any losses at any rates, repeated ones, huge ones and none at all."""
    search = LRSearch(LOW, HIGH)
    for decade, loss, std in told:
        search.tell(10.0**decade, loss, std)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rates, decision = search.ask(count), search.decide()
    for lr in (*rates, decision.lr):
        assert LOW * (1 - 1e-9) <= lr <= HIGH
    if search.ceiling > LOW * 1.001:
        assert all(lr < search.ceiling for lr in rates)
    assert not math.isnan(decision.loss)
