"""The books: every action's cost is on exactly one account."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.ledger import Cost, Ledger
from autolrs_plugin.core.state import RunState

PROBE = Probe(0, 0, (0.1,) * 4, 9.0, evaluate=True)
STEPS: list[tuple[Action, Result]] = [
    (Snapshot(), Result(seconds=0.5)),
    (PROBE, Result((1.0,) * 4, 2.0, seconds=6.0, eval_seconds=1.5, restore_seconds=0.5, tokens=40)),
    (PROBE, Result((1.0, math.nan), seconds=2.5, restore_seconds=0.5, tokens=20)),
    (Restore(), Result(seconds=0.25)),
    (Train(0, (0.1,) * 10), Result((1.0,) * 10, seconds=10.0, tokens=100)),
    (Evaluate(10), Result(val_loss=1.0, seconds=2.5, eval_seconds=2.5)),
]


def booked(*pairs: tuple[Action, Result]) -> Ledger:
    ledger = Ledger()
    for action, result in pairs:
        ledger.record(action, result)
    return ledger


def test_every_action_is_on_its_account() -> None:
    ledger = booked(*STEPS)
    assert ledger.train == Cost(1, 10, 100, 10.0)
    assert ledger.search == Cost(2, 6, 60, 6.0)
    assert ledger.search_evaluation == Cost(1, 0, 0, 1.5)
    assert ledger.evaluation == Cost(1, 0, 0, 2.5)
    assert ledger.snapshot == Cost(4, 0, 0, 1.75)
    assert ledger.seconds == sum(result.seconds for _, result in STEPS)
    assert ledger.steps_total == 16
    assert ledger.search_share == 6 / 16
    assert ledger.step_seconds == 1.0
    assert ledger.snapshot_cost_steps == 1.75 / 4
    ledger.record(Done(), Result())
    assert ledger == booked(*STEPS)


def test_what_one_evaluation_takes_counts_those_that_were_made() -> None:
    """A probe that diverged was not evaluated, so it must not make evaluations look cheaper than they are."""
    ledger = booked(*STEPS)
    assert ledger.eval_cost_steps == pytest.approx((1.5 + 2.5) / 2)


def test_steps_taken_back_become_the_searchs() -> None:
    ledger = booked(*STEPS)
    before = ledger.seconds
    ledger.take_back(4)
    assert ledger.train == Cost(1, 6, 60, 6.0)
    assert (ledger.search.steps, ledger.search.tokens, ledger.search.seconds) == (10, 100, 10.0)
    assert ledger.seconds == before
    assert ledger.steps_total == 16
    ledger.take_back(6)
    assert ledger.train.steps == 0
    assert ledger.search_share == 1.0


def test_overheads_are_in_the_sum_and_are_taken_over() -> None:
    ledger = booked(*STEPS)
    before = ledger.seconds
    ledger.deciding_s, ledger.bookkeeping_s = 3.0, 4.0
    assert ledger.seconds == before + 7.0
    other = Ledger(deciding_s=100.0)
    other.take_over(ledger.overhead)
    assert (other.deciding_s, other.bookkeeping_s) == (3.0, 4.0)
    other.take_over({})
    assert other == Ledger()


def test_an_empty_ledger_divides_by_nothing() -> None:
    ledger = Ledger()
    ledger.take_back(0)
    numbers = (ledger.search_share, ledger.step_seconds, ledger.eval_cost_steps, ledger.snapshot_cost_steps)
    assert numbers == (0.0, 0.0, 0.0, 0.0)
    values = json.loads(json.dumps(booked(*STEPS).to_mapping()))
    assert values["train"] == {"times": 1, "steps": 10, "tokens": 100, "seconds": 10.0}
    assert values["search_share"] == 6 / 16
    assert values["snapshot_cost_steps"] == 1.75 / 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_nothing_is_lost_over_any_course_of_actions(data: st.DataObject) -> None:
    """Steps, tokens and seconds of all accounts are those of all results, however often the run goes back."""
    state, results = RunState(AutoLRSConfig(max_steps=1000, lr_range=(0.1, 1.0))), []
    state.observe(Snapshot(), Result())
    for kind in data.draw(
        st.lists(st.sampled_from([Train, Probe, Restore, Snapshot, Evaluate]), max_size=12)
    ):
        n, seconds = data.draw(st.integers(1, 9)), data.draw(st.floats(0, 100))
        action: Action = kind() if kind in (Restore, Snapshot) else Evaluate(state.step)
        result = Result(seconds=seconds)
        if kind is Train:
            action, result = Train(state.step, (0.1,) * n), Result((1.0,) * n, seconds=seconds, tokens=n)
        elif kind is Probe:
            action = Probe(0, 0, (0.1,) * n, 9.0, evaluate=False)
            result = Result((1.0,) * n, seconds=seconds, restore_seconds=seconds / 4, tokens=n)
        state.observe(action, result)
        results.append(result)
    ledger, steps = state.ledger, sum(len(r.losses) for r in results)
    assert ledger.steps_total == steps
    assert ledger.train.tokens + ledger.search.tokens == steps
    assert ledger.train.steps == state.step == len(state.losses)
    assert ledger.seconds == pytest.approx(sum(r.seconds for r in results), abs=1e-9)
    assert all(value >= -1e-9 for value in (ledger.train.seconds, ledger.search.seconds, ledger.search_share))
