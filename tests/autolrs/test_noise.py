"""Runs whose first loss is no scale: losses that scatter widely, or lie near zero, or are few."""

import math
from dataclasses import replace
from typing import Any

import pytest

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
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
