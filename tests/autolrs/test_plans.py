"""The plans, on landscapes whose best learning rate is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_plugin.core.actions import Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.paper_plan import CANDIDATES, search_cost, stages
from autolrs_plugin.core.training_plan import diverged_above, has_diverged
from tests.autolrs.landscapes import Landscape, best_peak, drive

WIDE = (1e-6, 10.0)


def controller_of(**values: object) -> Controller:
    return Controller(AutoLRSConfig.from_mapping({"max_steps": 1000, "lr_range": WIDE, **values}))


@pytest.mark.parametrize("best", [1e-4, 3e-3, 0.1])
@pytest.mark.parametrize("scatter", [0.0, 0.02])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_peak_is_within_a_factor_of_two_of_the_best(best: float, scatter: float, seed: int) -> None:
    landscape, controller = Landscape(best, scatter=scatter, seed=seed), controller_of(seed=seed)
    drive(controller, landscape)
    peak = max(controller.schedule.lrs)
    assert 0.5 <= peak / best_peak(landscape, controller) <= 2.0


def test_a_hard_minibatch_is_no_divergence() -> None:
    # With batches this noisy some losses are twice the first one at any learning rate.
    landscape, controller = Landscape(3e-3, scatter=0.4), controller_of()
    drive(controller, landscape)
    peak = controller.stages[-1]
    assert sum(c.diverged for c in peak.candidates) <= 1
    assert controller.ledger.search.times == sum(len(s.candidates) for s in controller.stages)
    assert 0.2 <= max(controller.schedule.lrs) / best_peak(landscape, controller) <= 5.0


@pytest.mark.parametrize("max_steps", [60, 240])
def test_short_runs_on_noisy_minibatches_find_the_order_of_magnitude(max_steps: int) -> None:
    """A short range test shows noise first of all, and a hard minibatch comes to all probes of a stage alike."""
    off, reasons = [], []
    for seed in range(20):
        landscape = Landscape(3e-3, scatter=0.4, seed=seed, speed=0.15)
        controller = controller_of(max_steps=max_steps, seed=seed)
        drive(controller, landscape)
        off.append(abs(math.log10(max(controller.schedule.lrs) / landscape.best)))
        last = controller.stages[-1]
        reasons.append(last.reason)
        if "too hard at any rate" in last.reason:
            assert last.chosen_lr == pytest.approx(math.sqrt(last.candidates[0].lr * last.candidates[-1].lr))
    assert sorted(off)[14] <= 1.0
    assert any("too hard at any rate" in reason for reason in reasons) == (max_steps == 240)


@pytest.mark.parametrize("seed", range(8))
def test_what_counts_as_diverged_goes_by_the_scatter_of_the_minibatches(seed: int) -> None:
    controller = controller_of(max_steps=240)
    actions = drive(controller, Landscape(3e-3, scatter=0.6, seed=seed))
    rising, still = (c.losses for c in controller.stages[0].candidates)
    first = np.median(rising[: max(2, len(rising) // 3)])
    probes = [action for action in actions if isinstance(action, Probe) and action.stage > 0]
    assert probes
    assert all(probe.abort_above >= 0.9 * first + 5 * np.std(still) for probe in probes)


def test_a_fault_at_the_lowest_rate_leaves_no_room_for_finer_probes_and_ends_no_run() -> None:
    controller, landscape = controller_of(lr_range=(2e-3, 1.0)), Landscape(3e-3)
    broken = False
    while not isinstance(action := controller.next(), Done):
        result = landscape.perform(action)
        if isinstance(action, Probe) and len(controller.ahead) == 4:
            result, broken = Result(losses=(math.nan,)), True
        controller.tell(result)
    assert broken
    assert controller.step == 1000
    assert [stage.kind for stage in controller.stages] == ["range", "peak"]


@pytest.mark.parametrize("edge", [0.03, 3.0])
def test_a_range_that_mostly_diverges_costs_little(edge: float) -> None:
    # At edge=0.03 everything above 3e-7 * 1e2 explodes: five of the seven decades.
    landscape, controller = Landscape(1e-3, edge=edge), controller_of()
    drive(controller, landscape)
    assert max(controller.schedule.lrs) < edge * 1e-3
    assert controller.ledger.search_share <= 0.2
    assert landscape.loss < 0.5 + 3.0


def test_noise_is_told_from_a_second_sweep_only_where_there_is_noise() -> None:
    probes = []
    for scatter in (0.001, 0.3):
        controller = controller_of()
        drive(controller, Landscape(3e-3, scatter=scatter))
        probes.append(len(controller.stages[0].candidates))
    assert probes == [1, 2]


@given(
    max_steps=st.integers(1, 400),
    search_budget=st.floats(0.01, 1.0),
    warmup=st.floats(0.0, 0.5),
    eval_cost_steps=st.floats(0.0, 30.0),
    validation=st.booleans(),
    final_decay=st.booleans(),
    low=st.floats(-7, -1),
    decades=st.floats(0.001, 7),
    best=st.floats(-6, 1),
    edge=st.floats(-3, 2),
    scatter=st.floats(0, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_settings(
    low: float, decades: float, best: float, edge: float, scatter: float, **values: object
) -> None:
    lr_range = (10**low, 10 ** (low + decades))
    controller = controller_of(lr_range=lr_range, **values)
    config = controller.config
    actions = drive(controller, Landscape(10**best, 10**edge, scatter))
    budget = config.search_budget * config.max_steps
    assert controller.state.search_cost_steps <= budget + 1e-9
    assert controller.ledger.search.steps <= budget
    assert_ends_on_trained_weights(actions)
    assert controller.step == config.max_steps
    assert len(controller.losses) == len(controller.schedule) == config.max_steps
    peak = max(controller.schedule.lrs)
    assert 0 < peak <= lr_range[1] * (1 + 1e-9)
    for action in actions:
        if isinstance(action, Probe):
            assert max(action.lrs) <= lr_range[1] * (1 + 1e-9)
            assert config.validation or not action.evaluate
    if config.validation:
        assert controller.val_losses[-1][0] == config.max_steps
    if config.final_decay and config.max_steps >= 25:  # the last of the five steps that it takes then
        assert controller.schedule.lrs[-1] <= 0.2 * peak


def assert_ends_on_trained_weights(actions: list[object]) -> None:
    probing = False
    for action in actions:
        if isinstance(action, Probe):
            probing = True
        elif isinstance(action, Restore):
            probing = False
        else:
            assert not probing or not isinstance(action, Train | Evaluate | Snapshot | Done)
    assert not probing


@given(max_steps=st.integers(1, 300), validation=st.booleans(), eval_cost_steps=st.floats(0, 10))
@settings(max_examples=6, deadline=None)
def test_the_paper_plan_costs_what_it_says(max_steps: int, validation: bool, eval_cost_steps: float) -> None:
    controller = controller_of(
        mode="paper", max_steps=max_steps, validation=validation, eval_cost_steps=eval_cost_steps
    )
    actions = drive(controller, Landscape(3e-3, edge=1e6))
    cost = search_cost(max_steps, eval_cost_steps if validation else 0.0)
    assert controller.state.search_cost_steps == pytest.approx(cost)
    assert [len(s.candidates) for s in controller.stages] == [CANDIDATES] * len(list(stages(max_steps)))
    assert_ends_on_trained_weights(actions)
    assert controller.step == max_steps


def test_the_papers_stages_double_and_probe_for_a_tenth() -> None:
    assert [stop for stop, _ in stages(1000)] == [50, 150, 350, 750, 1000]
    assert [full for _, full in stages(1000)] == [False, False, False, True, True]
    controller = controller_of(mode="paper")
    drive(controller, Landscape(3e-3))
    assert [len(s.candidates[0].lrs) for s in controller.stages] == [5, 10, 20, 40, 25]
    assert controller.schedule.lrs[-1] == controller.stages[-1].chosen_lr  # no decay


def test_without_a_decay_the_run_stays_at_its_peak() -> None:
    controller = controller_of(final_decay=False)
    drive(controller, Landscape(3e-3))
    assert controller.schedule.lrs[-1] == max(controller.schedule.lrs)


class Cliff(Landscape):
    """A run that explodes once, at its 300th real step, unless the learning rate is halved."""

    def perform(self, action):  # type: ignore[no-untyped-def]
        result = super().perform(action)
        if isinstance(action, Train):
            self.highest = max(getattr(self, "highest", 0.0), *action.lrs)
            if action.first_step == 300 and action.lrs[0] > 0.5 * self.highest:
                return type(result)(losses=(math.nan,) * len(action.lrs))
        return result


def test_a_divergence_is_taken_back_and_repeated_lower_within_the_budget() -> None:
    controller = controller_of()
    drive(controller, Cliff(3e-3))
    lrs = controller.schedule.lrs
    assert lrs[300] == pytest.approx(lrs[299] / 2, rel=0.02)
    assert all(math.isfinite(loss) for loss in controller.losses)
    assert controller.state.search_cost_steps <= 250
    assert controller.step == 1000


def test_a_run_that_diverges_for_good_ends_all_the_same() -> None:
    class Broken(Landscape):
        def perform(self, action):  # type: ignore[no-untyped-def]
            result = super().perform(action)
            if isinstance(action, Train):
                return type(result)(losses=(math.nan,) * len(action.lrs))
            return result

    controller = controller_of()
    drive(controller, Broken(3e-3))
    assert controller.step == 1000
    assert controller.state.search_cost_steps <= 250


@pytest.mark.parametrize(("first", "above"), [(2.0, 4.0), (-3.0, 0.0), (0.0, 1e-3), (math.nan, math.inf)])
def test_divergence_is_a_multiple_of_the_first_losss_scale(first: float, above: float) -> None:
    assert diverged_above(first) == pytest.approx(above)


def test_one_outlier_is_no_divergence() -> None:
    assert not has_diverged([1.0] * 10 + [9.0] + [1.0], above=4.0)
    assert has_diverged([1.0] * 10 + [9.0] * 4, above=4.0)
    assert has_diverged([1.0, math.nan, 1.0], above=4.0)
