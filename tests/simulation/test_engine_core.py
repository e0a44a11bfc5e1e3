"""The simulator's loop against vLLM's own: the real `EngineCore.step` and `step_with_batch_queue`, beside ours."""

from collections import deque
from concurrent.futures import Future
from queue import Queue
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine.core import EngineCore

from tests.simulation.places import MODES, EvenTimes, simulator, small_place
from vllm_sarathi.engine.offline import build_output, build_request
from vllm_sarathi.simulation.deployment import build, scheduler_choice
from vllm_sarathi.simulation.simulator import NAP_S
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

STAGE_S = 0.01
HOST_S = 0.001


class Executor:
    """A device under the engine core: every stage takes the same, and a result is waited for on a virtual clock."""

    def __init__(self, core: "Core", stages: int) -> None:
        self.core = core
        self.free_s = [0.0] * stages
        self.launched: list[tuple[Any, float]] = []

    def execute_model(self, scheduler_output: Any, non_block: bool) -> Future[Any]:
        at_s = self.core.now_s
        if scheduler_output.total_num_scheduled_tokens:
            at_s += HOST_S
            for stage, free_s in enumerate(self.free_s):
                self.free_s[stage] = at_s = max(at_s, free_s) + STAGE_S
        requests = self.core.scheduler.requests
        sampled = {
            name: [] if requests[name].is_prefill_chunk else [0]
            for name in scheduler_output.num_scheduled_tokens
        }
        return Result(self.core, at_s, build_output(sampled))

    def sample_tokens(self, _grammar: Any, non_block: bool = False) -> Any:
        raise AssertionError("execute_model has given the tokens already")


class Result(Future[Any]):
    """A result that is there at a virtual time."""

    def __init__(self, core: "Core", at_s: float, output: Any) -> None:
        super().__init__()
        self.core, self.at_s, self.output = core, at_s, output

    def result(self, timeout: float | None = None) -> Any:
        self.core.now_s = max(self.core.now_s, self.at_s)
        return self.output


class Core(EngineCore):
    """vLLM's engine core with all but its step functions left out."""

    def __init__(self, scheduler: Any, stages: int, in_flight: int) -> None:
        self.now_s = 0.0
        self.scheduler = scheduler
        self.batch_queue_size = in_flight
        self.batch_queue: Any = deque(maxlen=in_flight) if in_flight > 1 else None
        self.aborts_queue: Queue[Any] = Queue()
        self.model_executor: Any = Executor(self, stages)
        self.is_mm_encoder_only = False
        self.is_pooling_model = True  # the executor's first answer is the whole one
        self.vllm_config = scheduler.vllm_config

    def _should_throttle_prefills(self) -> bool:
        return False

    def capture_iteration_details(self, scheduler_output: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def log_error_detail(self, scheduler_output: Any) -> Any:
        return self.capture_iteration_details(scheduler_output)

    def _attach_iteration_details(self, *_: Any) -> None: ...

    def _attach_weight_version(self, *_: Any) -> None: ...


def serve(core: Core, requests: list[SimulatedRequest]) -> list[list[float]]:
    """Do what vLLM's busy loop does, on the virtual clock; return the times of each request's tokens."""
    times: list[list[float]] = [[] for _ in requests]
    left = deque(enumerate(requests))
    step = core.step if core.batch_queue is None else core.step_with_batch_queue
    while True:
        if not (core.scheduler.has_requests() or core.batch_queue):
            if not left:
                return times
            core.now_s = max(core.now_s, left[0][1].arrival_s)
        while left and left[0][1].arrival_s <= core.now_s:
            number, request = left.popleft()
            core.scheduler.add_request(
                build_request(
                    str(number), [0] * request.prompt_tokens, request.output_tokens, request.arrival_s
                )
            )
        outputs, executed = step()
        for each in (outputs or {}).values():
            for output in each.outputs:
                times[int(output.request_id)] += [core.now_s] * len(output.new_token_ids)
        if not executed and core.scheduler.has_requests():
            core.now_s += NAP_S


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_tokens", [16384, 3000], ids=["room", "preempting"])
@pytest.mark.parametrize("name", ["default", "sarathi@128", "prefill-first"])
def test_every_token_comes_when_it_comes_from_the_engine_core(name: str, kv_tokens: int, mode: str) -> None:
    rng = np.random.default_rng(5)
    requests = [
        SimulatedRequest(float(at_s), int(rng.integers(1, 900)), int(rng.integers(1, 40)))
        for at_s in np.cumsum(rng.exponential(0.05, 40))
    ]
    stages, in_flight = MODES[mode]
    place = small_place(mode, kv_tokens)
    ours = simulator(requests, name, mode, times=EvenTimes(stages, STAGE_S, HOST_S), place=place)
    ours.run()
    scheduler = build(place, scheduler_choice(name), in_flight=in_flight)
    scheduler._has_express = False
    core = Core(scheduler, stages, in_flight)
    if hasattr(scheduler, "wall_clock"):
        scheduler.clock = scheduler.wall_clock = lambda: core.now_s
    theirs = serve(core, requests)
    assert [len(times) for times in theirs] == [request.output_tokens for request in requests]
    for log, times in zip(ours.logs, theirs, strict=True):
        assert log.token_s == pytest.approx(times, abs=1e-9)
