"""The staged plan on landscapes with known answers, each with a twin that has no stages, no watch or no evidence test.

Regret is the final loss against the best schedule of the same shape, as a share of what that one gains. Figures are
for the worst of several seeds.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from autolrs_plugin.core import posterior
from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.plans import stage_search, staged
from autolrs_plugin.core.plans.bracket import DOWN
from autolrs_plugin.core.plans.finite import NotFiniteError
from autolrs_plugin.core.plans.horizon import long_run
from autolrs_plugin.core.plans.watch import FINE, RISE_Z, Watch
from tests.autolrs.landscapes import (
    Drifting,
    FallingCliff,
    Landscape,
    Plateau,
    TwoValleys,
    drive,
    final_loss,
    regret,
)

BEST = 3e-3
CONFIG = AutoLRSConfig(max_steps=1000, lr_range=(1e-6, 10.0))


def run(landscape: Landscape, prior: float | None, mode: str = "staged", **settings: Any) -> Controller:
    controller = Controller(replace(CONFIG, prior_lr=prior, mode=mode, seed=landscape.seed, **settings))
    drive(controller, landscape)
    return controller


def worst(kind: type[Landscape], prior: float | None, mode: str = "staged", **settings: float) -> float:
    regrets = []
    for seed in range(4):
        landscape = kind(BEST, seed=seed, **settings)
        regrets.append(regret(landscape, run(landscape, prior, mode)))
    return max(regrets)


def test_a_plateau_first() -> None:
    """Nothing is decided on the plateau, and the stage after it decides."""
    controller = run(Plateau(BEST), prior=3e-4)
    assert controller.stages[0].chosen_lr == 3e-4
    assert "no evidence" in controller.stages[0].reason
    assert worst(Plateau, 3e-4) < 0.01
    assert worst(Plateau, 3e-4, "once") > 0.15


def test_an_optimum_that_drifts_is_followed() -> None:
    assert worst(Drifting, 1e-3, speed=0.01) < 0.02
    assert worst(Drifting, 1e-3, "once", speed=0.01) > 0.1


@contextmanager
def without_evidence() -> Iterator[None]:
    """The lowest mean is taken, whatever the noise."""
    with patch.multiple(posterior, COLD=(0.0, 0.0), UP=(0.0, 0.0), DOWN=(0.0, 0.0), LEAST_STD=1e-3):
        yield


def test_noise_that_is_larger_than_the_differences_moves_nothing() -> None:
    noise = {"scatter": 0.5, "speed": 0.005}
    moved = 0
    for seed in range(8):
        controller = run(Landscape(BEST, seed=seed, **noise), prior=BEST)
        moved += sum(stage.chosen_lr != BEST for stage in controller.stages)
    assert moved <= 1
    with without_evidence():
        controllers = [run(Landscape(BEST, seed=seed, **noise), prior=BEST) for seed in range(8)]
    assert sum(stage.chosen_lr != BEST for c in controllers for stage in c.stages) >= 6


class Noisy(Landscape):
    """The noise of the observed losses is of one size, like that of small minibatches at the end of a run."""

    def steps(self, lrs, rng, above=math.inf):  # type: ignore[no-untyped-def]
        return tuple(loss + rng.normal(scale=0.3) for loss in super().steps(lrs, rng, above))


def test_noise_takes_nothing_back_in_a_short_run() -> None:
    """Its chunks have seven losses, and some, between an evaluation and the next chunk, have one."""

    def least_rates() -> list[float]:
        settings: dict[str, Any] = {"max_steps": 250, "eval_cost_steps": 5.0}
        runs = [run(Noisy(BEST, scatter=0, seed=s, speed=0.02), BEST, **settings) for s in range(8)]
        return [min(c.schedule.lrs[25:190]) for c in runs]

    assert min(least_rates()) > 0.9 * BEST
    with (
        patch.object(Watch, "_calm", lambda _, chunk: chunk),
        patch.object(Watch, "_rise_z", lambda *_: RISE_Z),
    ):
        assert sum(rate < 0.5 * BEST for rate in least_rates()) >= 3


def test_a_cliff_that_comes_down_is_backed_away_from() -> None:
    """The prior lies below the edge at first and above it later; what has exploded is taken back."""
    assert worst(FallingCliff, 2e-2, speed=0.01) < 0.05
    with patch.object(Watch, "judge", lambda *_: FINE), patch.object(staged, "SHARES", (0.0,)):
        assert worst(FallingCliff, 2e-2, speed=0.01) > 1.0


def test_of_two_valleys_the_deeper_one() -> None:
    """The prior lies at the bottom of the shallow one."""
    assert worst(TwoValleys, BEST / 10, speed=0.01) < 0.02
    twin = TwoValleys(BEST, speed=0.01)
    kept = final_loss(twin, run(TwoValleys(BEST, speed=0.01), BEST / 10), BEST / 10)
    assert (kept - 0.5) / 3.0 > 0.04


@pytest.mark.parametrize("prior", [1e-4, 3e-4, 3e-3, 1e-2, None])
def test_wherever_the_prior_lies(prior: float | None) -> None:
    assert worst(Landscape, prior) < 0.02


def test_without_a_prior_it_begins_in_the_middle_of_the_range() -> None:
    outside = run(Landscape(BEST), prior=100.0)
    assert outside.schedule == run(Landscape(BEST), prior=None).schedule
    assert outside.stages[0].candidates[0].lr == pytest.approx(math.sqrt(1e-5))


def test_stages_are_as_cheap_as_the_evidence_allows() -> None:
    """At the best rate the first stage looks upwards once or twice, and downwards, and the second one either way."""
    controller = run(Landscape(BEST, edge=3.0), prior=BEST)
    assert [stage.chosen_lr for stage in controller.stages] == [BEST] * 2
    assert all(len(stage.candidates) <= 4 for stage in controller.stages)
    assert controller.ledger.search_share < 0.16


class Change(Landscape):
    """From the middle on, other data: the loss is up again, and wants another rate."""

    height = 3.0

    def shrinks(self, lr: float) -> float:
        if self.taken < 500:
            return super().shrinks(lr)
        shrunk = super().shrinks(lr / 10)
        return 1 - (self.height / self.excess) * (1 - shrunk) if self.taken == 500 else shrunk


def test_a_change_on_the_way_opens_a_stage() -> None:
    changed, once = Change(BEST, speed=0.012), Change(BEST, speed=0.012)
    controller = run(changed, prior=BEST)
    run(once, prior=BEST, mode="once")
    assert any(stage.kind == "change" and stage.first_step >= 500 for stage in controller.stages)
    assert changed.loss < 0.9 * once.loss
    # The rise was not the rate's fault: after the chunk was repeated at a lower one, the rate is what it was.
    assert controller.schedule.lrs[480] == pytest.approx(BEST, rel=0.5)


@pytest.mark.parametrize("settings", [{}, {"rewind": False}, {"mode": "once"}])
def test_other_data_whose_loss_is_far_above_the_first_one_are_no_explosion(settings: dict[str, Any]) -> None:
    """A loss that stays as high at a lower rate does not freeze the run, and is the scale from there on."""
    changed = Change(BEST, speed=0.012)
    changed.height = 30.0
    controller = run(changed, prior=BEST, **settings)
    opened = [stage.first_step for stage in controller.stages if stage.kind == "change"]
    assert bool(opened) == ("mode" not in settings)
    assert all(500 <= step <= 575 for step in opened)
    assert min(controller.schedule.lrs[600:790]) >= 0.15 * BEST
    assert changed.loss < 25


class Swings(Landscape):
    """Above the best rate, losses swing up after a while."""

    too_high = 0.9

    def shrinks(self, lr: float) -> float:
        return -0.05 if lr > self.too_high * self.best and self.taken > 400 else super().shrinks(lr)


def test_a_rise_is_taken_back_and_repeated_lower() -> None:
    landscape = Swings(BEST, speed=0.01)
    controller = run(landscape, prior=BEST)
    assert controller.ledger.search.steps > sum(stage.search_steps for stage in controller.stages)
    assert max(controller.schedule.lrs[450:]) <= 0.9 * BEST
    assert landscape.loss < 0.6


class Bursts(Landscape):
    """Far above the best rate, the loss jumps up in the last but one step of a chunk."""

    def shrinks(self, lr: float) -> float:
        return -3.0 / self.excess if lr > 1.2 * self.best and self.taken == 423 else super().shrinks(lr)


def test_a_rise_at_the_end_of_a_chunk_is_taken_back_to_before_it() -> None:
    landscape = Bursts(BEST, speed=0.01)
    controller = run(landscape, prior=3 * BEST)
    assert max(controller.state.losses[430:]) < 1.0
    assert max(controller.schedule.lrs[430:]) <= 1.2 * BEST


class Destroyed(Landscape):
    """At ten times the best rate and more, losses go up, the higher the rate, and stay; the first probes miss that."""

    def shrinks(self, lr: float) -> float:
        if lr < 10 * self.best or self.taken < 18:
            return super().shrinks(lr)
        return 1 - 3.0 * (1 + lr / (100 * self.best)) / self.excess


def test_a_run_that_is_worse_than_untrained_is_taken_back_as_long_as_that_helps() -> None:
    landscape = Destroyed(BEST, edge=300.0, speed=0.01)
    controller = run(landscape, prior=60 * BEST)
    assert max(controller.schedule.lrs[100:]) < 10 * BEST
    assert landscape.loss < 0.6


class Unfrozen(Landscape):
    """From the middle on, layers join in that explode at a rate which was harmless, and are harmed far below it."""

    def shrinks(self, lr: float) -> float:
        if self.taken < 500 or lr < 0.05 * self.best:
            return super().shrinks(lr)
        lost = 200.0 if self.taken % 3 == 0 else 10.0
        return 1 - (lost if lr > 0.2 * self.best else 20.0 * lr / self.best) / self.excess


def test_a_rate_at_which_the_run_was_lost_is_not_taken_up_again() -> None:
    """One lower try that only rises is no sign that the rate was not to blame: the next one lies lower again."""
    landscape = Unfrozen(BEST, speed=0.01)
    controller = run(landscape, prior=BEST, search_budget=0.4)
    assert controller.schedule.lrs[480] == pytest.approx(BEST, rel=0.5)
    assert max(controller.schedule.lrs[560:]) < 0.05 * BEST
    assert landscape.loss < 2.0


@pytest.mark.parametrize(
    ("lost_above", "harmed_above", "back_to"), [(0.2, math.inf, 0.16), (math.inf, 0.5, 1.0)]
)
def test_what_a_lower_rate_does_not_mend_is_gone_on_with_at_the_last_rate_that_was_not_lost(
    lost_above: float, harmed_above: float, back_to: float
) -> None:
    class Changed(Landscape):
        """From the middle on the loss is up, whatever the rate; at the higher ones it is higher, or explodes."""

        def shrinks(self, lr: float) -> float:
            if self.taken < 500:
                return super().shrinks(lr)
            lost = 200.0 if self.taken % 3 == 0 else 10.0
            harmed = 4.0 if lr > harmed_above * self.best else 2.0
            return 1 - (lost if lr > lost_above * self.best else harmed) / self.excess

    controller = run(Changed(BEST, speed=0.01), prior=BEST, search_budget=0.4)
    after = [stage.candidates[0].lr for stage in controller.stages if stage.first_step > 500]
    assert after[0] == pytest.approx(back_to * BEST, rel=0.5)


def test_a_rate_that_is_too_high_by_some_is_found_to_be_early_on() -> None:
    """Nothing rises: a probe downwards shows it, after a tenth of the run."""
    landscape = Landscape(BEST, speed=0.01)
    controller = run(landscape, prior=4 * BEST)
    assert controller.schedule.lrs[150] < 2 * BEST
    assert regret(landscape, controller) < 0.02
    with patch.object(staged, "SHARES", (0.0,)):
        kept = run(Landscape(BEST, speed=0.01), prior=4 * BEST)
    assert kept.schedule.lrs[150] > 2.2 * BEST


class Late(Landscape):
    """What is far too high a rate is the best one at first; later the loss creeps up at it."""

    def shrinks(self, lr: float) -> float:
        if self.taken < 80:
            return super().shrinks(lr / 10)
        return -0.01 if lr > self.best / 2 else super().shrinks(lr)


def test_where_the_present_rate_gains_nothing_a_lower_one_is_looked_at_first() -> None:
    """Earlier probes say that higher rates are better; a probe that ends no lower than before says otherwise."""

    def second_stage() -> tuple[list[float], float]:
        stage = run(Late(BEST, speed=0.01), prior=3 * BEST).stages[1]
        present = stage.candidates[0].lr
        return [c.lr / present for c in stage.candidates[1:]], stage.chosen_lr / present

    asked, chosen = second_stage()
    assert asked == pytest.approx([DOWN, DOWN**2])
    assert chosen <= DOWN**2
    with patch.object(Watch, "has_gained", False):
        asked, kept = second_stage()
    assert asked[0] > 1
    assert kept > chosen


def test_a_probe_that_is_lost_tells_of_its_neighbours() -> None:
    """Two probes above the prior explode or would: with the first one lost, nothing between them is asked for."""

    def asked() -> list[float]:
        controller = run(Landscape(BEST, edge=8.0, speed=0.01), prior=3 * BEST)
        return [c.lr for c in controller.stages[0].candidates]

    assert sum(lr > 3 * BEST for lr in asked()) == 1
    with patch.object(stage_search, "LOST_STD", 1e3):
        assert sum(lr > 3 * BEST for lr in asked()) == 2


def test_without_a_way_back_it_goes_on_lower() -> None:
    class Explodes(Landscape):
        def shrinks(self, lr: float) -> float:
            return -0.5 if lr > BEST and self.taken > 300 else super().shrinks(lr)

    controller = run(Explodes(BEST), prior=2 * BEST, rewind=False)
    assert max(controller.schedule.lrs[360:]) <= BEST
    assert controller.step == 1000


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 0.0), (1e4, 0.0), (1.0, -50.0), (3.0, 7.0)])
def test_the_unit_of_the_training_loss_does_not_matter(scale: float, shift: float) -> None:
    class Scaled(Landscape):
        def perform(self, action):  # type: ignore[no-untyped-def]
            if isinstance(action, Probe) and math.isfinite(action.abort_above):
                action = replace(action, abort_above=(action.abort_above - shift) / scale)
            result = super().perform(action)
            return replace(result, losses=tuple(scale * loss + shift for loss in result.losses))

    chosen = [s.chosen_lr for s in run(Landscape(BEST), prior=3e-4).stages]
    scaled = [s.chosen_lr for s in run(Scaled(BEST), prior=3e-4).stages]
    assert scaled == pytest.approx(chosen, rel=0.3)


@pytest.mark.parametrize(
    ("value", "greater"),
    [
        (math.exp, False),
        (lambda loss: 1000 * loss, False),
        (lambda loss: loss - 50, False),
        (lambda loss: 100 - 10 * loss, True),
    ],
    ids=["perplexity", "sum", "negative", "grows"],
)
def test_the_unit_of_the_validation_does_not_matter(value, greater: bool) -> None:  # type: ignore[no-untyped-def]
    class Valued(Landscape):
        def perform(self, action):  # type: ignore[no-untyped-def]
            result = super().perform(action)
            return result if result.val_loss is None else replace(result, val_loss=value(result.val_loss))

    settings: dict[str, Any] = {"eval_cost_steps": 0.5}
    plain, valued = Landscape(BEST), Valued(BEST)
    chosen = [s.chosen_lr for s in run(plain, prior=3e-4, **settings).stages]
    assert [
        s.chosen_lr for s in run(valued, prior=3e-4, greater_is_better=greater, **settings).stages
    ] == pytest.approx(chosen, rel=0.2)
    assert any(c.val_loss is not None for s in run(plain, 3e-4, **settings).stages for c in s.candidates)


class Faulty(Landscape):
    """Some of its losses, by the number of the step, are not finite, and nothing else."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(BEST)
        self.bad, self.count = bad, 0

    def perform(self, action):  # type: ignore[no-untyped-def]
        result = super().perform(action)
        losses = []
        for loss in result.losses:
            self.count += 1
            losses.append(math.nan if self.count in self.bad else loss)
            if isinstance(action, Probe) and math.isnan(losses[-1]):
                return Result(losses=tuple(losses))
        return replace(result, losses=tuple(losses))


@pytest.mark.parametrize("at", [1, 2, 5, 60, 200, 500, 700, 1100])
def test_one_loss_that_is_not_finite_costs_nothing(at: int) -> None:
    landscape = Faulty({at})
    controller = run(landscape, prior=1e-3)
    assert controller.step == 1000
    assert regret(Landscape(BEST), controller) is not None
    assert landscape.loss < 0.52
    assert max(controller.schedule.lrs) > 1e-3


def test_losses_that_are_never_finite_are_an_error_within_a_chunk() -> None:
    landscape = Faulty(set(range(1, 5000)))
    with pytest.raises(NotFiniteError, match="none of the last 25 losses up to step 25 is finite"):
        run(landscape, prior=1e-3)
    assert landscape.count < 100


class TooHigh(Landscape):
    """Diverges at any rate of the range."""

    def shrinks(self, lr: float) -> float:
        return -50.0


def test_a_range_that_is_too_high_is_said_to_be() -> None:
    with pytest.raises(NotFiniteError, match=r"lr_range=\(5, 50\), and losses .* that range is too high"):
        run(TooHigh(BEST), prior=None, lr_range=(5.0, 50.0))


def test_a_warm_start_hardly_searches_and_loses_nothing() -> None:
    cold, warm = Drifting(BEST, speed=0.01), Drifting(BEST, speed=0.01)
    first = run(cold, prior=1e-3)
    points = tuple((s.first_step / 1000, s.chosen_lr) for s in first.stages)
    second = run(warm, prior=1e-3, warm_start=points)
    assert second.ledger.search_share <= 0.05
    assert warm.loss <= cold.loss * 1.01
    assert [s.kind for s in second.stages] == ["warm start"]


def test_a_warm_start_follows_what_the_earlier_run_found_on_the_way() -> None:
    """Without it, the same change opens a stage."""
    points = ((0.0, BEST), (0.52, 10 * BEST))
    landscape = Change(BEST, speed=0.012)
    controller = run(landscape, prior=BEST, warm_start=points)
    assert [s.kind for s in controller.stages] == ["warm start"]
    assert controller.schedule.lrs[480] == pytest.approx(BEST)
    assert controller.schedule.lrs[520] == pytest.approx(10 * BEST)  # as settled as the earlier run
    assert controller.ledger.search_share <= 0.05
    unwarned = Change(BEST, speed=0.012)
    run(unwarned, prior=BEST)
    assert landscape.loss <= unwarned.loss


def test_a_warm_start_opens_no_stage_and_follows_only_lower_rates_where_a_lower_one_mends() -> None:
    changed = run(Change(BEST, speed=0.012), prior=BEST, warm_start=((0.0, BEST),))
    assert [s.kind for s in changed.stages] == ["warm start"]
    points = ((0.0, 3 * BEST), (0.5, 3 * BEST), (0.6, 0.3 * BEST), (0.7, 0.5 * BEST))
    landscape = Swings(BEST, speed=0.01)
    landscape.too_high = 2.0
    swinging = run(landscape, prior=BEST, warm_start=points)
    assert [s.kind for s in swinging.stages] == ["warm start"]
    assert swinging.schedule.lrs[590] == pytest.approx(1.2 * BEST)  # not that of the second point
    assert swinging.schedule.lrs[680] == pytest.approx(0.3 * BEST)
    assert swinging.schedule.lrs[780] == pytest.approx(0.5 * BEST)
    assert swinging.ledger.search_share <= 0.05


def test_a_warm_start_whose_rate_goes_wrong_on_the_way_is_left() -> None:
    landscape = FallingCliff(BEST, speed=0.01)
    controller = run(landscape, prior=BEST, warm_start=((0.0, 2e-2), (0.9, 2e-2)))
    assert regret(landscape, controller) < 0.05
    with patch.object(Watch, "judge", lambda *_: FINE):
        kept = FallingCliff(BEST, speed=0.01)
        assert regret(kept, run(kept, prior=BEST, warm_start=((0.0, 2e-2), (0.9, 2e-2)))) > 1.0


def test_a_warm_start_that_does_not_hold_any_more_is_left() -> None:
    landscape = Landscape(BEST, edge=2.0)
    controller = run(landscape, prior=None, warm_start=((0.0, 1.0),))
    assert max(controller.schedule.lrs) < 1.0
    assert landscape.loss < 3.0


class Interrupted(Landscape):
    """Its first probes, a number of them, are left for a signal, each after a step."""

    left = 0

    def perform(self, action: Action) -> Result:
        result = super().perform(action)
        if isinstance(action, Probe) and self.left:
            self.left -= 1
            return replace(result, losses=result.losses[:1], val_loss=None, stopped=True)
        return result


@pytest.mark.parametrize(("left", "at"), [(1, 25), (3, 68)])
def test_a_warm_start_that_was_left_for_a_signal_is_checked_with_a_later_chunk(left: int, at: int) -> None:
    """The third time, that is the rate of the second point, to which the run has come meanwhile."""
    landscape = Interrupted(BEST, speed=0.012)
    landscape.left = left
    controller = run(landscape, prior=BEST, warm_start=((0.0, BEST), (0.052, 2 * BEST), (0.5, BEST)))
    (stage,) = controller.stages
    assert (stage.kind, stage.first_step) == ("warm start", at)
    assert controller.schedule.lrs[70] == pytest.approx(2 * BEST)
    assert controller.schedule.lrs[520] == pytest.approx(BEST)


def test_a_warm_start_that_does_not_hold_is_left_also_where_a_signal_came_first() -> None:
    landscape = Interrupted(BEST, edge=2.0)
    landscape.left = 1
    controller = run(landscape, prior=None, warm_start=((0.0, 1.0),))
    assert [s.kind for s in controller.stages[:2]] == ["warm start", "planned"]
    assert max(controller.schedule.lrs[25:]) < 1.0


def test_find_takes_everything_back_and_says_what_it_knows() -> None:
    landscape = Landscape(BEST)
    controller = Controller(replace(CONFIG, mode="find", prior_lr=1e-3, search_budget=0.06))
    actions = drive(controller, landscape)
    assert not any(isinstance(action, Train | Evaluate) for action in actions)
    assert isinstance(actions[-1], Restore)
    assert isinstance(controller.next(), Done)
    assert landscape.loss == Landscape(BEST).loss
    (stage,) = controller.stages
    assert stage.low <= stage.chosen_lr <= stage.high
    assert BEST / 3 <= stage.chosen_lr <= 3 * BEST


def test_the_long_run_wants_less_than_short_probes_and_the_prior_pulls() -> None:
    assert long_run(1e-2, 1e-2) == pytest.approx(1e-2)
    assert 1e-3 < long_run(1e-2, 1e-3) < 1e-2 / 2
    # The further away, the less it pulls.
    assert 1e-2 < long_run(0.1, 1e-6) < 0.1
    assert 1e-3 < long_run(1e-3, 1e-2) < 1e-2


def test_a_stage_that_could_not_decide_is_followed_by_one_that_looks_as_far() -> None:
    """The prior is three decades too low, and noise hides it from the first stage."""
    looked = {}
    for seed in (0, 4, 5):
        controller = run(Landscape(BEST, scatter=0.3, seed=seed, speed=0.01), prior=3e-6)
        first, second = controller.stages[:2]
        assert "no evidence" in first.reason
        assert first.chosen_lr == 3e-6
        looked[seed] = max(probe.lr for probe in second.candidates) / 3e-6
    assert min(looked.values()) > 10.0, looked
