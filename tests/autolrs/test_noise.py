"""Runs whose first loss is no scale: losses that scatter widely, or lie near zero, or are few."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Probe, Result, ends
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.plans.probing import Tried, no_fault_of_the_rate
from tests.autolrs.landscapes import Landscape, drive

BEST = 3e-3


def run(landscape: Landscape, prior: float, **settings: Any) -> Controller:
    config = AutoLRSConfig(max_steps=400, lr_range=(1e-6, 10.0))
    controller = Controller(replace(config, prior_lr=prior, seed=landscape.seed, **settings))
    drive(controller, landscape)
    return controller


class Loud(Landscape):
    """Noise that is larger than the loss, about zero."""

    def steps(self, lrs, rng, above=math.inf):  # type: ignore[no-untyped-def]
        losses = [loss - 3.5 + rng.normal(scale=5.0) for loss in super().steps(lrs, rng)]
        ends = [i for i, loss in enumerate(losses, start=1) if loss > above]
        return tuple(losses[: ends[0] if ends else None])


@pytest.mark.parametrize("seed", range(8))
def test_noise_about_zero_is_no_divergence(seed: int) -> None:
    controller = run(Loud(BEST, seed=seed, speed=0.01), prior=BEST)
    assert not any("diverged" in stage.reason for stage in controller.stages)
    assert min(controller.schedule.lrs[25:310]) >= 0.9 * BEST


class HeavyTailed(Landscape):
    """Each minibatch adds a square of Student's t to the loss, at whatever rate: most are small, some are huge."""

    def steps(self, lrs, rng, above=math.inf):  # type: ignore[no-untyped-def]
        losses: list[float] = []
        for lr in lrs:
            t = np.random.default_rng([self.seed, self.taken]).standard_t(1.5)
            losses.append(super().steps([lr], rng)[0] + t * t)
            if not losses[-1] <= above:
                break
        return tuple(losses)


@pytest.mark.parametrize("seed", range(8))
def test_outliers_do_not_lower_the_rate(seed: int) -> None:
    """A chunk that is as bad when it is repeated at a lower rate was not its fault, and the rate comes back."""
    controller = run(HeavyTailed(BEST, seed=seed, speed=0.01), prior=BEST)
    rates = controller.schedule.lrs[25:310]
    assert rates[-1] >= 0.9 * BEST
    assert sum(rate < 0.9 * BEST for rate in rates) <= 0.2 * len(rates)


class Unequal(Landscape):
    """Sums over minibatches of four sizes, the first one of which is small."""

    def perform(self, action):  # type: ignore[no-untyped-def]
        if hasattr(action, "abort_above"):
            action = replace(action, abort_above=math.inf)
        result = super().perform(action)
        losses = tuple(loss * (1, 4, 2, 5)[i % 4] for i, loss in enumerate(result.losses))
        return replace(result, losses=losses)


@pytest.mark.parametrize(("prior", "stays"), [(BEST / 10, True), (100 * BEST, False)])
def test_sums_over_unequal_minibatches_do_not_hide_a_real_divergence(prior: float, stays: bool) -> None:
    controller = run(Unequal(BEST, speed=0.01), prior=prior)
    assert ("diverged" not in controller.stages[0].reason) == stays
    assert (controller.stages[0].chosen_lr >= prior) == stays


def probe(*losses: float) -> Tried:
    return Tried(1.0, Probe(0, 0, (1.0,) * len(losses), math.inf, False), Result(losses=losses), False)


def test_a_probe_goes_on_after_one_loss_that_is_not_finite() -> None:
    assert not ends([2.0, math.nan], 4.0)
    assert not ends([math.nan], 4.0)
    assert ends([2.0, math.nan, math.inf], math.inf)
    assert ends([2.0, 5.0], 4.0)
    assert ends([math.inf], 4.0)
    gone_on = probe(math.nan, 2.0, 3.0, math.inf, 1.0)
    assert gone_on.losses == (2.0, 2.0, 3.0, 3.0, 1.0)
    assert gone_on.whole
    assert not probe(2.0, math.nan).whole


def test_noise_before_a_loss_that_is_not_finite_is_no_fault_of_the_rate() -> None:
    """A rate that is too high shows in a loss that is: twice the first one, or more than the reference scatters."""
    assert no_fault_of_the_rate(probe(2.3, 2.2, 2.6, math.nan), None)
    assert not no_fault_of_the_rate(probe(2.3, 2.2, 26.0, math.nan), None)
    reference = replace(probe(2.3, 2.2, 2.4, 2.2), held=True)
    assert no_fault_of_the_rate(probe(2.3, 2.45, math.nan), reference)
    assert not no_fault_of_the_rate(probe(2.3, 4.0, math.nan), reference)


def test_a_probe_of_a_job_outlives_a_loss_that_is_not_finite() -> None:
    model, calls = torch.nn.Linear(4, 1), [0]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(batch: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss = (model(batch) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss * math.nan if calls[0] == 7 else loss

    data = list(torch.randn(40, 8, 4, generator=torch.Generator().manual_seed(0)))
    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=600,
        lr_range=(1e-6, 10.0),
        train_step=step,
        train_data=data,
        progress=False,
    )
    tuner.run()
    first = tuner.stages[0].candidates[0]
    assert [i for i, loss in enumerate(first.losses) if math.isnan(loss)] == [6]
    assert len(first.losses) > 7
    assert math.isfinite(first.forecast)


@pytest.mark.parametrize(("scatter", "speed"), [(0.3, 2e-3), (0.02, 1e-9)])
@pytest.mark.parametrize("steps", [8, 20, 30, 40, 60])
def test_a_run_without_room_for_a_search_keeps_its_rate_whatever_the_noise(
    steps: int, scatter: float, speed: float
) -> None:
    """Its chunks are a few steps: one loss does not tell how losses scatter. Nor does it climb on a plateau."""
    for seed in range(4):
        controller = run(
            Landscape(BEST, scatter=scatter, seed=seed, speed=speed), prior=BEST, max_steps=steps
        )
        assert not controller.stages
        assert controller.ledger.search.steps == 0
        assert max(controller.schedule.lrs) == pytest.approx(BEST)
        assert controller.schedule.lrs[int(0.75 * steps)] == pytest.approx(BEST)
