"""Properties of SarathiScheduler, one by one, in scenes small enough to follow."""

from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_sarathi import SarathiConfig, SarathiScheduler
from vllm_sarathi.engine.vllm.contract import scheduler_classes
from vllm_sarathi.testing.modelled import NGRAM, ModelledEngine


@pytest.fixture
def make_engine(make_config: Any) -> Any:
    """Return a function that builds an engine with a token budget."""

    def make(
        budget: int, mode: str = "sync", in_flight: int = 1, blocks: int = 400, **engine_args: Any
    ) -> Any:
        config = make_config(SarathiConfig(token_budget=budget), mode, **engine_args)
        return ModelledEngine(config, num_blocks=blocks, in_flight=in_flight)

    return make


def test_running_decodes_are_in_every_step_when_a_long_prompt_lands(make_engine: Any) -> None:
    engine = make_engine(16)
    for name in ("a", "b", "c"):
        engine.add(name, 4, max_tokens=40)
    engine.step()
    engine.add("long", 200)
    for _ in range(10):
        scheduled = engine.step().scheduled
        assert scheduled == {"a": 1, "b": 1, "c": 1, "long": 13}


def test_decodes_go_before_a_prefill_that_started_first(make_config: Any) -> None:
    # Stock walks its list from the head, where the long prompt is, and leaves a decode without its draft tokens.
    config = make_config(
        SarathiConfig(token_budget=8), speculative_config=NGRAM, long_prefill_token_threshold=4
    )
    engine = ModelledEngine(config, num_blocks=400, draft=lambda name, position: [1, 2, 3])
    engine.add("long", 200)
    for name in ("a", "b"):
        engine.add(name, 1, max_tokens=40)
    engine.step()
    assert [r.request_id for r in engine.scheduler.running] == ["long", "a", "b"]
    assert engine.step().scheduled == {"a": 4, "b": 4}


def test_partial_prefills_are_served_in_arrival_order(make_engine: Any) -> None:
    engine = make_engine(12, long_prefill_token_threshold=5, scheduling_policy="priority")
    engine.add("later", 60, arrival_s=2.0)
    engine.add("other", 60, arrival_s=3.0)
    engine.step()
    engine.add("first", 60, arrival_s=1.0)
    engine.step()
    names = list(engine.step().scheduled)
    assert names == ["first", "later", "other"]


def test_decodes_that_outgrow_the_budget_take_turns(make_config: Any) -> None:
    config = make_config(SarathiConfig(token_budget=8), speculative_config=NGRAM)
    engine = ModelledEngine(config, num_blocks=400, draft=lambda name, position: [1, 2, 3])
    for i in range(8):
        engine.add(f"r{i}", 1, max_tokens=50)
    engine.step()
    served = [set(engine.step().scheduled) for _ in range(8)]
    assert all(len(names) == 2 for names in served)
    assert set.union(*served[:4]) == set.union(*served[4:]) == {f"r{i}" for i in range(8)}


def test_a_prefill_is_preempted_before_any_decode(make_engine: Any) -> None:
    engine = make_engine(32, blocks=18, long_prefill_token_threshold=2)
    engine.add("long", 200, max_tokens=4)
    engine.add("a", 15, max_tokens=120)
    engine.add("b", 15, max_tokens=120)
    preempted: list[set[str]] = []
    while "long" not in engine.finished and len(preempted) < 400:
        step = engine.step()
        if step.preempted:
            preempted.append(step.preempted)
            decode_lost = step.preempted & step.decodes_allowed.keys()
            assert not decode_lost or step.preempted >= step.partial_before.keys()
    engine.drain()
    assert preempted


def test_the_class_follows_how_vllm_resolved_asynchronous_scheduling(make_engine: Any) -> None:
    synchronous = make_engine(64).scheduler
    asynchronous = make_engine(64, mode="async", in_flight=2).scheduler
    assert isinstance(synchronous, SarathiScheduler)
    assert not isinstance(synchronous, AsyncScheduler)
    assert isinstance(asynchronous, SarathiScheduler)
    assert isinstance(asynchronous, AsyncScheduler)


def test_an_asynchronous_decode_runs_in_every_step(make_engine: Any) -> None:
    engine = make_engine(64, mode="async", in_flight=2)
    engine.add("a", 4, max_tokens=20)
    assert all("a" in engine.step().scheduled for _ in range(15))


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
@pytest.mark.parametrize("blocks", [24, 400])
def test_tokens_equal_those_of_the_stock_scheduler(
    make_config: Any, make_engine: Any, mode: str, blocks: int
) -> None:
    in_flight = 1 if mode == "sync" else 2
    ours = make_engine(20, mode=mode, in_flight=in_flight, blocks=blocks)
    stock = ModelledEngine(make_config(mode=mode), num_blocks=blocks, in_flight=in_flight)
    for engine in (ours, stock):
        for i, length in enumerate((5, 90, 19, 200, 1, 33, 120, 21)):
            engine.add(f"r{i}", length, max_tokens=17)
            engine.step()
        engine.drain()
    assert ours.outputs == stock.outputs
    assert all(len(tokens) == 17 for tokens in ours.outputs.values())


def test_a_prompt_that_cannot_be_cut_gets_the_engines_own_budget(make_engine: Any, monkeypatch: Any) -> None:
    engine = make_engine(16)
    parent = scheduler_classes()[0]
    parent_schedule = parent.schedule
    seen = []

    def refuse_small_budgets(scheduler: Any, *args: Any) -> Any:
        seen.append(scheduler.max_num_scheduled_tokens)
        slots = scheduler.max_num_running_reqs
        admitting = slots if seen[-1] >= 100 else len(scheduler.running)
        scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = admitting
        try:
            return parent_schedule(scheduler, *args)
        finally:
            scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = slots

    monkeypatch.setattr(parent, "schedule", refuse_small_budgets)
    engine.add("image", 100, max_tokens=2)
    engine.drain(most_steps=20)
    assert seen[:4] == [16, 16, 16, 256]


def test_a_failing_plan_costs_a_stock_step_and_not_the_engine(make_engine: Any, monkeypatch: Any) -> None:
    engine = make_engine(16)
    monkeypatch.setattr(engine.scheduler.controller, "plan", lambda view: 1 / 0)
    engine.add("a", 100, max_tokens=3)
    engine.drain(most_steps=10)
    assert engine.scheduler.faults.total > 0
    assert len(engine.outputs["a"]) == 3
