"""The simulator itself: its clock, its seeds, its arithmetic on devices so simple that the answer is known."""

import random
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.simulation.places import EvenTimes, requests_at_once, simulator, small_place
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.outcome import outcome_of
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

STAGE_S, HOST_S = 0.01, 0.001


def test_one_request_on_a_device_of_even_steps() -> None:
    engine = simulator(requests_at_once((100, 5)), times=EvenTimes())
    engine.run()
    step_s = STAGE_S + HOST_S
    assert engine.logs[0].token_s == pytest.approx([step_s * n for n in range(1, 6)])
    assert engine.logs[0].scheduled_s == 0.0
    outcome = outcome_of(engine.logs)
    assert outcome.gaps_s == pytest.approx([step_s] * 4)
    assert outcome.ttfts_s == pytest.approx([step_s])
    assert outcome.output_tokens_per_s == pytest.approx(5 / (5 * step_s))


def test_asynchronous_scheduling_hides_the_host() -> None:
    engine = simulator(requests_at_once((100, 50)), mode="async", times=EvenTimes())
    engine.run()
    gaps = np.diff(engine.logs[0].token_s)
    assert gaps[1:-1] == pytest.approx([STAGE_S] * 47)


def test_a_pipeline_overlaps_two_batches() -> None:
    times = EvenTimes(stages=2)
    alone = simulator(requests_at_once((100, 40)), mode="pipeline", times=times)
    both = simulator(requests_at_once((400, 40), (400, 40)), mode="pipeline", times=times)
    alone.run()
    both.run()
    # One request cannot fill two stages; the second one runs in the bubbles of the first.
    assert both.now_s < 1.2 * alone.now_s
    assert np.diff(alone.logs[0].token_s).min() >= 2 * STAGE_S


def test_a_prompt_waits_for_the_step_that_runs() -> None:
    # The second arrives in the middle of the first one's second step.
    engine = simulator(requests_at_once((10, 20), (10, 2), gap_s=0.0165), times=EvenTimes())
    engine.run()
    second = engine.logs[1]
    assert second.scheduled_s == pytest.approx(0.022)
    assert second.token_s[0] == pytest.approx(0.033)


def test_what_arrives_late_is_awaited_on_the_clock() -> None:
    engine = simulator(requests_at_once((10, 2), (10, 2), gap_s=1000.0), times=EvenTimes())
    engine.run()
    assert engine.logs[1].token_s[0] == pytest.approx(1000.011)


class Shapes(EvenTimes):
    """Notes the shapes that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[StepShape, int]] = []

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        self.seen.append((shape, prefix_tokens))
        return STAGE_S


def test_the_device_is_told_what_a_step_computes() -> None:
    times = Shapes()
    engine = simulator(requests_at_once((700, 3), (20, 2)), "default", times=times)  # 512 tokens a step
    engine.run()
    assert times.seen == [
        (StepShape(512, 0, 0, chunk_work(0, 512), 1), 0),
        (StepShape(208, 0, 0, chunk_work(512, 188) + chunk_work(0, 20), 2), 512),
        (StepShape(2, 2, 720, 0.0, 2), 0),
        (StepShape(1, 1, 701, 0.0, 1), 0),
    ]


@pytest.mark.parametrize("name", ["default", "sarathi"])
def test_a_seed_gives_the_same_run_to_the_last_bit(name: str) -> None:
    settings: dict[str, Any] = {"tbt_slo_ms": 5.0} if name == "sarathi" else {}

    def run(seed: int) -> list[list[float]]:
        requests = [r for r in synthetic("uniform", 200.0, 60, seed) if r.prompt_tokens < 1500]
        engine = simulator(requests, name, "async", **settings)
        engine.run()
        return [log.token_s for log in engine.logs]

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
@pytest.mark.parametrize("order", ["fcfs", "deadline"])
def test_no_clock_but_the_virtual_one_is_read(monkeypatch: pytest.MonkeyPatch, mode: str, order: str) -> None:
    requests = [
        SimulatedRequest(0.01 * i, 100 + 37 * i, 20, tbt_slo_ms=50.0, ttft_slo_ms=500.0) for i in range(20)
    ]
    settings: dict[str, Any] = {
        "tbt_slo_ms": 5.0,
        "prefill_order": order,
        "ttft_slo_ms": 100.0 if order == "deadline" else None,
        "allow_request_slo": True,
        "tbt_mode": "pace" if order == "deadline" else "gap",
    }
    engine, same = (simulator(requests, "sarathi", mode, **settings) for _ in range(2))
    same.run()
    mad = random.Random(0)

    def clock() -> float:
        """Answer vLLM, which stamps its log entries, with nonsense, and us not at all."""
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("vllm_sarathi"), f"{caller} reads a real clock"
        return mad.uniform(-1e9, 1e9)

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, clock)
    try:
        engine.run()
    finally:
        monkeypatch.undo()
    assert all(log.finished for log in engine.logs)
    assert [log.token_s for log in engine.logs] == [log.token_s for log in same.logs]
    assert engine.scheduler.faults.total == 0


def test_a_scheduler_that_lets_nobody_in_is_found_out() -> None:
    engine = simulator(requests_at_once((10, 2)), times=EvenTimes())
    engine.scheduler.max_num_running_reqs = 0
    if hasattr(engine.scheduler, "max_num_active_reqs"):
        engine.scheduler.max_num_active_reqs = 0
    with pytest.raises(RuntimeError, match=r"stands still .* with 1 requests left"):
        engine.run()


def test_a_hopeless_run_is_given_up() -> None:
    engine = simulator(requests_at_once((10, 900), (10, 900)), times=EvenTimes())
    engine.run(hopeless=lambda run: run.steps > 300)
    assert engine.given_up
    assert 300 < engine.steps < 900


def test_prefixes_are_shared_where_a_trace_shares_them() -> None:
    shared = [SimulatedRequest(float(i), 600, 3, prefix=(7,)) for i in range(3)]
    own = [SimulatedRequest(float(i), 600, 3, prefix=(i,)) for i in range(3)]

    def read(requests: list[SimulatedRequest], share: bool) -> list[int]:
        times = Shapes()
        simulator(requests, share_prefixes=share, times=times).run()
        return [shape.tokens for shape, _ in times.seen if shape.prefill_work > 0]

    assert sum(read(own, True)) == sum(read(shared, False)) == 1800
    assert sum(read(shared, True)) == 600 + 2 * 88  # 512 of 600 tokens are cached


def test_the_kv_cache_is_as_large_as_the_deployment_says() -> None:
    place = small_place(kv_tokens=4096)
    assert abs(place.kv_tokens - 4096) <= 1
    engine = simulator(requests_at_once((10, 2)), place=place)
    # vLLM keeps one block as the null block.
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 4096 // 16 - 1
