"""The express lane against the plain way, step by step: the same batches, the same books, the same times."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.properties import REPEATABLE
from tests.simulation.places import MODES, simulator, small_place
from vllm_sarathi.simulation.outcome import outcome_of
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

SCHEDULERS = ("default", "sarathi", "sarathi@96", "prefill-first", "pressure", "chunked-only")


def requests(seed: int, count: int = 60, rate_qps: float = 400.0) -> list[SimulatedRequest]:
    """Return requests of all lengths; every third shares a long prefix with others."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate_qps, count))
    return [
        SimulatedRequest(
            float(at_s),
            int(rng.integers(1, 1400)),
            int(rng.integers(1, 120)),
            prefix=(int(rng.integers(0, 3)),) if i % 3 == 0 else (),
        )
        for i, at_s in enumerate(times)
    ]


def books(engine: Simulator) -> Any:
    """Return what vLLM's scheduler keeps of each request, and the order in which it keeps them."""
    scheduler = engine.scheduler
    return (
        engine.now_s,
        [r.request_id for r in scheduler.running],
        [r.request_id for r in scheduler.waiting],
        {
            name: (
                r.num_computed_tokens,
                r.num_tokens,
                r.num_output_placeholders,
                r.num_in_flight_tokens,
                r.is_prefill_chunk,
                r.num_preemptions,
                r.status,
            )
            for name, r in scheduler.requests.items()
        },
        scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        scheduler.prev_step_scheduled_req_ids,
        scheduler.finished_req_ids,
    )


def learnt(engine: Simulator) -> Any:
    """Return what our policy has learnt of the device."""
    return engine.scheduler.controller.model.to_mapping() if hasattr(engine.scheduler, "controller") else None


class Watched:
    """A simulator whose batches are written down."""

    def __init__(self, engine: Simulator, express: bool) -> None:
        self.engine = engine
        self.batches: list[dict[str, int]] = []
        self.plans: list[Any] = []
        self.hidden = self.quiet = 0
        scheduler = engine.scheduler
        assert scheduler._has_express
        scheduler._has_express = express
        schedule = scheduler.schedule

        def watched(*args: Any) -> Any:
            output = schedule(*args)
            self.batches.append(dict(output.num_scheduled_tokens))
            assert sum(output.num_scheduled_tokens.values()) == output.total_num_scheduled_tokens
            self.hidden += len(output.express.steady)
            self.quiet += output.express.quiet
            return output

        scheduler.schedule = watched
        if hasattr(scheduler, "controller"):
            plan = scheduler.controller.plan

            def planned(view: Any) -> Any:
                self.plans.append((view, plan(view)))
                return self.plans[-1][1]

            scheduler.controller.plan = planned


def compare(express: Watched, plain: Watched) -> int:
    """Step both until all is done, compare them after each step, and return the most preemptions of a request."""
    preemptions = 0
    while True:
        more, more_plain = express.engine.step(), plain.engine.step()
        assert more == more_plain
        assert express.batches[-1:] == plain.batches[-1:]
        assert express.plans[-1:] == plain.plans[-1:]
        assert books(express.engine) == books(plain.engine)
        preemptions = max(
            [preemptions, *(r.num_preemptions for r in express.engine.scheduler.requests.values())]
        )
        if not more:
            break
    assert [log.token_s for log in express.engine.logs] == [log.token_s for log in plain.engine.logs]
    assert all(log.finished for log in express.engine.logs)
    assert outcome_of(express.engine.logs).to_mapping() == outcome_of(plain.engine.logs).to_mapping()
    assert learnt(express.engine) == learnt(plain.engine)
    assert plain.hidden == plain.quiet == 0
    return preemptions


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_express_lane_is_the_plain_way_but_faster(name: str, mode: str, share_prefixes: bool) -> None:
    settings: dict[str, Any] = {"tbt_slo_ms": 3.0} if name == "sarathi" else {}
    express, plain = (
        Watched(simulator(requests(1), name, mode, share_prefixes, **settings), lane)
        for lane in (True, False)
    )
    compare(express, plain)
    if not (share_prefixes and mode == "async"):  # there a block's hash needs the token that is still to come
        assert express.hidden > 0.1 * sum(map(len, express.batches)), "it carried too little to prove it"
    if share_prefixes:
        pool = express.engine.scheduler.kv_cache_manager.block_pool
        assert len(pool.cached_block_hash_to_block) > 0


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["default", "sarathi@96"])
def test_the_express_lane_where_requests_are_preempted(name: str, mode: str, share_prefixes: bool) -> None:
    place = small_place(mode, kv_tokens=4096)
    express, plain = (
        Watched(simulator(requests(2), name, mode, share_prefixes, place=place), lane)
        for lane in (True, False)
    )
    assert compare(express, plain) > 0, "nothing was preempted"
    assert express.hidden > 0 or (share_prefixes and mode == "async")


@settings(REPEATABLE, max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    rate_qps=st.sampled_from((1.0, 20.0, 60.0, 400.0)),
    name=st.sampled_from(("default", "sarathi", "sarathi@96", "prefill-first")),
    mode=st.sampled_from(sorted(MODES)),
    share_prefixes=st.booleans(),
    kv_tokens=st.sampled_from((4096, 16384)),
    max_sequences=st.sampled_from((2, 8, 32)),
)
def test_any_workload_is_the_same_step_by_step(
    seed: int,
    count: int,
    rate_qps: float,
    name: str,
    mode: str,
    share_prefixes: bool,
    kv_tokens: int,
    max_sequences: int,
) -> None:
    """What is decided and seen in each step, when it ends, what is learnt from it, and the figures in the end."""
    place = small_place(mode, kv_tokens, max_sequences)
    settings: dict[str, Any] = {"tbt_slo_ms": 3.0} if name == "sarathi" else {}
    sent = requests(seed, count, rate_qps)
    express, plain = (
        Watched(simulator(sent, name, mode, share_prefixes, place=place, **settings), lane)
        for lane in (True, False)
    )
    compare(express, plain)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["default", "sarathi", "sarathi@96"])
def test_most_steps_of_a_quiet_night_are_counted_without_the_parent(name: str, mode: str) -> None:
    """Some long answers, of which one begins and others end while they last; then they go on."""
    sent = [SimulatedRequest(at_s, 100 + i, 400) for i, at_s in enumerate((0.0, 0.0, 0.1, 0.25))]
    settings: dict[str, Any] = {"tbt_slo_ms": 3.0} if name == "sarathi" else {}
    express, plain = (Watched(simulator(sent, name, mode, **settings), lane) for lane in (True, False))
    compare(express, plain)
    assert express.quiet > 0.8 * len(express.batches)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["default", "sarathi@96"])
def test_quiet_steps_end_where_blocks_run_out(name: str, mode: str) -> None:
    """All are let in at once, and their answers grow beyond the KV cache."""
    place = small_place(mode, kv_tokens=4096)
    sent = [SimulatedRequest(0.0, 10 + i, 700) for i in range(8)]
    express, plain = (Watched(simulator(sent, name, mode, place=place), lane) for lane in (True, False))
    assert compare(express, plain) > 0, "nothing was preempted"
    assert express.quiet > 0.4 * len(express.batches)


def test_a_hidden_request_that_was_preempted_meanwhile_is_left_to_the_parent() -> None:
    engine = simulator(requests(1), "default", "async", False)
    scheduler = engine.scheduler
    while not (scheduler._under_way and len(scheduler._under_way[0].steady) > 1):
        assert engine.step()
    passage, output = scheduler._under_way[0], engine._batches[0].output
    assert output.express is passage
    gone = passage.steady[0]
    gone.num_stale_output_tokens = 1  # as vLLM marks one whose tokens are in flight when it is preempted
    scheduler._plain_steps += 1
    before = [request.num_tokens for request in passage.steady]
    assert gone.request_id in scheduler.settle(output)
    assert [r.num_tokens - was for r, was in zip(passage.steady, before, strict=True)] == [
        0 if request is gone else 1 for request in passage.steady
    ]
