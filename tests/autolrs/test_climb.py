"""Plateaus after a gain: the rate rises until the run has left them, and comes back where that is of no use."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from autolrs_plugin.core.actions import Probe, Restore, Snapshot
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.plans.watch import Watch
from tests.autolrs.landscapes import Landscape, drive
from tests.autolrs.test_watch import watching

BEST = 3e-3


class Saddle(Landscape):
    """After a first gain nothing is gained, whatever the rate, until the rates since then add up to some distance."""

    height, distance = 1.5, 1500.0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.gone = self.kept_gone = 0.0

    def shrinks(self, lr: float) -> float:
        if self.excess > self.height or self.gone > self.distance:
            return super().shrinks(lr)
        self.gone += lr / self.best
        return -1.0 if lr > self.edge * self.best else 0.0

    def perform(self, action):  # type: ignore[no-untyped-def]
        if isinstance(action, Snapshot):
            self.kept_gone = self.gone
        elif isinstance(action, (Restore, Probe)):
            self.gone = self.kept_gone
        return super().perform(action)


def run(landscape: Landscape, prior: float, **settings: Any) -> Controller:
    config = AutoLRSConfig(max_steps=1000, lr_range=(1e-6, 10.0), prior_lr=prior, seed=landscape.seed)
    controller = Controller(replace(config, **settings))
    drive(controller, landscape)
    return controller


@pytest.mark.parametrize("seed", range(4))
def test_a_plateau_after_a_gain_is_left(seed: int) -> None:
    def final() -> float:
        landscape = Saddle(BEST, edge=300.0, seed=seed, speed=0.02)
        run(landscape, prior=BEST)
        return landscape.loss

    assert final() < 1.1
    with patch.object(Watch, "stuck", lambda *_: False):
        assert final() > 1.9


@pytest.mark.parametrize("edge", [4.0, 300.0])
def test_a_climb_in_vain_is_taken_back(edge: float) -> None:
    """Above the edge the loss rises; and where nothing rises, nothing is gained either."""
    landscape = Saddle(BEST, edge=edge, speed=0.02)
    landscape.distance = math.inf
    controller = run(landscape, prior=BEST)
    rates = controller.schedule.lrs
    before = rates[150]
    assert max(rates[150:700]) > 1.4 * before
    assert rates[760] == pytest.approx(before)
    assert landscape.loss < 2.1


def test_stuck_is_a_plateau_after_a_gain_and_not_the_end_of_learning() -> None:
    falling = [1.6, 1.3]
    assert watching([*falling, *[1.2] * 8]).stuck(500)
    assert not watching([1.2] * 3).stuck(500)  # too few to tell
    assert not watching([2.0] * 12).stuck(500)  # nothing was gained: that is `flat`
    assert not watching([*falling, *[1.2 - 0.02 * i for i in range(8)]]).stuck(500)
    assert not watching([*falling, *[0.15] * 8]).stuck(500)  # it has learnt
    assert not watching([*falling, *[1.2] * 8], scatter=0.4).stuck(500)  # a rise would be seen too late
