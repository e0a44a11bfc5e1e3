"""The plans, on landscapes whose best learning rate is known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.plans.finite import NotFiniteError
from autolrs_plugin.core.plans.paper import CANDIDATES, search_cost, stages
from autolrs_plugin.core.plans.training import diverged_above, has_diverged
from tests.autolrs.landscapes import Landscape, drive

WIDE = (1e-6, 10.0)


def controller_of(**values: object) -> Controller:
    return Controller(AutoLRSConfig.from_mapping({"max_steps": 1000, "lr_range": WIDE, **values}))


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
    try:
        actions = drive(controller, Landscape(10**best, 10**edge, scatter))
    except NotFiniteError:
        # It begins at a rate that explodes: in the middle of the range, for there is no prior.
        assert 10 ** (best + edge) <= math.sqrt(lr_range[0] * lr_range[1]) * 1.001
        return
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


def assert_ends_on_trained_weights(actions: list[Action]) -> None:
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


@pytest.mark.parametrize(("first", "above"), [(2.0, 4.0), (-3.0, 0.0), (0.0, 1e-3), (math.nan, math.inf)])
def test_divergence_is_a_multiple_of_the_first_losss_scale(first: float, above: float) -> None:
    assert diverged_above(first) == pytest.approx(above)


def test_one_outlier_is_no_divergence() -> None:
    assert not has_diverged([1.0] * 10 + [9.0] + [1.0], above=4.0)
    assert has_diverged([1.0] * 10 + [9.0] * 4, above=4.0)
    assert has_diverged([1.0, math.nan, 1.0], above=4.0)
