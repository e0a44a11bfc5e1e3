"""Whether it was the rate that a chunk went wrong."""

import pytest

from autolrs_plugin.core.plans.retreat import Retreats
from autolrs_plugin.core.plans.watch import FINE, LOST, RISEN, Watch

CALM = [1.0, 1.02, 0.98, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99]
RATE, LOWER = 1e-3, 4e-4


def watching() -> Watch:
    watch = Watch(first_loss=2.0, above=4.0)
    for end in (10, 20, 30, 40):
        watch.take(CALM, end)
    return watch


@pytest.mark.parametrize(("peak", "suspected"), [(295.0, False), (90.0, True), (5.0, True)])
def test_a_loss_that_is_as_high_at_a_lower_rate_is_its_minibatch_s(peak: float, suspected: bool) -> None:
    watch, retreats = watching(), Retreats(10)
    lost, again = (*CALM[:7], 10.0, 40.0, 300.0), (*CALM[:8], min(peak, 39.0), peak)
    assert watch.judge(lost, 50) == LOST
    assert retreats.suspects_rate(40, lost, LOST, watch)
    retreats.take_back(40, lost, LOST, RATE, LOWER, watch)
    assert watch.judge(again, 50) == LOST
    assert retreats.suspects_rate(40, again, LOST, watch) == suspected


def test_two_chunks_that_are_no_lower_at_a_lower_rate_give_it_back() -> None:
    watch, retreats = watching(), Retreats(10)
    risen = (*CALM, *CALM[:8], 1.9, 1.9)
    retreats.take_back(40, risen, RISEN, RATE, LOWER, watch)
    assert retreats.noise_at(40, risen, watch) == RATE
    assert retreats.noise_at(40, [loss - 0.3 for loss in risen], watch) is None
    retreats.take_back(40, risen[10:], RISEN, RATE, LOWER, watch)
    assert retreats.noise_at(40, risen[10:], watch) is None  # one chunk: it was found to be better


@pytest.mark.parametrize(("level", "at", "back"), [(0.0, 60, True), (0.5, 60, False), (0.0, 90, False)])
def test_a_run_that_is_soon_as_low_as_before_has_met_noise(level: float, at: int, back: bool) -> None:
    watch, retreats = watching(), Retreats(10)
    retreats.wait(50, RATE, watch)
    losses = [loss + level for loss in CALM]
    assert watch.judge(losses, at) in (FINE, RISEN)
    assert retreats.noise_at(at, losses, watch) == (RATE if back else None)
    retreats.clear()
    assert retreats.noise_at(at, losses, watch) is None
