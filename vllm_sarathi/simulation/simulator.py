"""The simulator: vLLM's engine core under virtual time, with the real scheduler and a modelled device.

The loop is that of vLLM's engine core (`EngineCore.step` and `step_with_batch_queue`): take in what has arrived,
schedule a batch, and unless more batches may be in flight, wait for the oldest and hand its tokens to the scheduler.
Waiting moves a virtual clock; nothing else takes time. One batch in flight is synchronous scheduling, two on one
device are asynchronous scheduling, as many as there are pipeline stages a pipeline.
`tests/simulation/test_engine_core.py` runs the engine core's own loop beside this one.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.engine.admission import is_refusal
from vllm_sarathi.engine.offline import block_hasher, build_output, build_request
from vllm_sarathi.engine.request_slo import CLASS_KEY, TBT_KEY, TENANT_KEY, TTFT_KEY
from vllm_sarathi.simulation.express import TOKEN
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest, prompt_token_ids

LOOK_EVERY_STEPS = 200

NAP_S = 0.001
"""What the engine core sleeps where it has requests and could schedule none."""

MOST_NAPS = 1000
"""After this many empty steps in a row, nothing but an arrival can wake the scheduler."""


class StepTimes(Protocol):
    """How long the parts of a step take on a device.

    Attributes:
        stages: pipeline stages, 1 without a pipeline.
        host_s: seconds on the host between the scheduler's answer and the first stage's start.
        host_sequence_s: seconds more for each sequence of the batch.
    """

    stages: int
    host_s: float
    host_sequence_s: float

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that each stage works on a batch.

        Args:
            shape: the batch.
            prefix_tokens: KV tokens before the prefill chunks, summed over the chunks.
        """
        ...

    def send_s(self, tokens: int) -> float:
        """Return the seconds to send a batch's activations to the next stage."""
        ...


@dataclass(slots=True)
class RequestLog:
    """What a client sees of one request; times are seconds of virtual time.

    Attributes:
        request: what was asked.
        scheduled_s: when its first token of prompt was scheduled; None before.
        token_s: when each token of its answer came.
        finished: whether its last token has come.
        refused: whether it was refused instead.
    """

    request: SimulatedRequest
    scheduled_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    finished: bool = False
    refused: bool = False


@dataclass(slots=True)
class _Batch:
    output: Any
    times_of_steady: list[list[float]]
    sampled: list[str]
    done_s: float


class Simulator:
    """One engine core under virtual time.

    Args:
        scheduler: as `deployment.build` makes one.
        times: the device.
        requests: the workload, in order of arrival.
        in_flight: batches that may be in flight.
    """

    more_may_come = False
    """Whether requests may be added yet: a scheduler that stands still may be waiting for one of them."""

    def __init__(
        self, scheduler: Any, times: StepTimes, requests: Sequence[SimulatedRequest], in_flight: int = 1
    ) -> None:
        self.scheduler = scheduler
        self.now_s = 0.0
        self.steps = 0
        self.logs = [RequestLog(request) for request in requests]
        self.finished: list[RequestLog] = []
        self.given_up = False
        self._times = times
        self._in_flight = in_flight
        self._batches: deque[_Batch] = deque()
        self._stage_free_s = [0.0] * times.stages
        self._steady: list[Any] = []
        self._times_of_steady: list[list[float]] = []
        self._by_name: dict[str, RequestLog] = {}
        self._next = 0
        self._naps = 0
        scheduler.in_flight = in_flight
        self._hasher = block_hasher(scheduler.vllm_config)
        if hasattr(scheduler, "wall_clock"):
            scheduler.clock = scheduler.wall_clock = self._clock

    def _clock(self) -> float:
        return self.now_s

    def step(self) -> bool:
        """Do what the engine core does between two looks at its input queue; return False when all is done."""
        self._take_arrivals()
        scheduler = self.scheduler
        has_requests = scheduler.has_requests()
        if not (has_requests or self._batches):
            if self._next >= len(self.logs):
                return False
            self._await_arrival()
            has_requests = scheduler.has_requests()
        executed = False
        if has_requests:
            output = scheduler.schedule()
            executed = output.total_num_scheduled_tokens > 0
            # What holds nothing takes its turn in the queue all the same.
            self._batches.append(self._launch(output) if executed else _Batch(output, [], [], self.now_s))
            self.steps += executed
            if len(self._batches) < self._in_flight and (executed or scheduler.has_requests()):
                return True
        oldest = self._batches.popleft()
        self._finish(oldest)
        self._naps = 0 if executed or oldest.output.total_num_scheduled_tokens else self._naps + 1
        if not executed and scheduler.has_requests():
            self._nap()
        return True

    def run(self, hopeless: Callable[["Simulator"], bool] | None = None) -> None:
        """Step until every request has finished, or until `hopeless` says that the rest does not matter."""
        look_at = LOOK_EVERY_STEPS
        with no_garbage_collection():
            while self.step():
                if hopeless is not None and self.steps >= look_at:
                    look_at = self.steps + LOOK_EVERY_STEPS
                    if hopeless(self):
                        self.given_up = True
                        return

    def arrived(self) -> Sequence[RequestLog]:
        """Return the logs of the requests that have arrived."""
        return self.logs[: self._next]

    def _nap(self) -> None:
        self.now_s += NAP_S
        if self._naps < MOST_NAPS:
            return
        if self._next >= len(self.logs):
            if self.more_may_come:
                return
            raise RuntimeError(
                f"the scheduler stands still at {self.now_s:.3f} s with {len(self.scheduler.requests)} requests left"
            )
        self._await_arrival()

    def _await_arrival(self) -> None:
        self._naps = 0
        self.now_s = max(self.now_s, self.logs[self._next].request.arrival_s)
        self._take_arrivals()

    def _take_arrivals(self) -> None:
        logs = self.logs
        while self._next < len(logs) and logs[self._next].request.arrival_s <= self.now_s:
            log = logs[self._next]
            name = str(self._next)
            self._by_name[name] = log
            self.scheduler.add_request(self._engine_request(name, log.request))
            self._next += 1

    def _engine_request(self, name: str, request: SimulatedRequest) -> Any:
        asked: dict[str, Any] = {
            TBT_KEY: request.tbt_slo_ms,
            TTFT_KEY: request.ttft_slo_ms,
            CLASS_KEY: request.kind or None,
            TENANT_KEY: request.tenant or None,
        }
        asked = {key: value for key, value in asked.items() if value is not None}
        asked |= self._asked_more(name)
        return build_request(
            name,
            prompt_token_ids(request, self._next, share_prefixes=self._hasher is not None),
            request.output_tokens,
            request.arrival_s,
            sampling={"extra_args": asked} if asked else None,
            block_hasher=self._hasher,
        )

    def _asked_more(self, name: str) -> dict[str, Any]:
        """Return what else a request is sent with."""
        return {}

    def _launch(self, output: Any) -> _Batch:
        """Send a batch through the stages of the device."""
        shape, prefix, sampled = self._shape(output)
        at_s = self.now_s + self._times.host_s + self._times.host_sequence_s * shape.sequences
        stage_s = self._times.stage_s(shape, prefix)
        for stage, free_s in enumerate(self._stage_free_s):
            if stage:
                at_s += self._times.send_s(shape.tokens)
            at_s = max(at_s, free_s) + stage_s
            self._stage_free_s[stage] = at_s
        return _Batch(output, self._steady_times(output.express.steady), sampled, at_s)

    def _steady_times(self, steady: list[Any]) -> list[list[float]]:
        """Return where the tokens of the steady requests are logged; they mostly are those of the step before."""
        if steady is not self._steady:
            by_name = self._by_name
            self._steady, self._times_of_steady = steady, [by_name[r.request_id].token_s for r in steady]
        return self._times_of_steady

    def _shape(self, output: Any) -> tuple[StepShape, int, list[str]]:
        """Return what a batch computes, its prefill chunks' prefix tokens, and who samples a token but the steady."""
        requests = self.scheduler.requests
        by_name = self._by_name
        sampled: list[str] = []
        # The steady ones decode one token each, so there is nothing to find out.
        context = output.express.context
        prefix = prefills = 0
        work = 0.0
        for name, tokens in output.express.visible.items():
            request = requests[name]
            computed = request.num_computed_tokens
            if not request.is_prefill_chunk:
                sampled.append(name)
                if tokens == 1 and computed > request.num_prompt_tokens:
                    context += computed - 1
                    continue
            log = by_name[name]
            if log.scheduled_s is None:
                self._begin(log)
            prefills += 1
            done = computed - tokens
            prefix += done
            work += chunk_work(done, tokens)
        count = len(output.num_scheduled_tokens)
        shape = StepShape(output.total_num_scheduled_tokens, count - prefills, context, work, count)
        return shape, prefix, sampled

    def _begin(self, log: RequestLog) -> None:
        """Note that a request's first token of prompt is scheduled."""
        log.scheduled_s = self.now_s

    def _finish(self, batch: _Batch) -> None:
        """Wait for a batch, and deliver its tokens."""
        self.now_s = now_s = max(self.now_s, batch.done_s)
        scheduler, by_name = self.scheduler, self._by_name
        names = scheduler.settle(batch.output)
        sampled = set(batch.sampled)
        result = self._result({name: [TOKEN] if name in sampled else [] for name in names})
        for name in batch.sampled:
            by_name[name].token_s.append(now_s)
        for times_s in batch.times_of_steady:
            times_s.append(now_s)
        for outputs in scheduler.update_from_output(batch.output, result).values():
            for output in outputs.outputs:
                if output.finish_reason is not None:
                    log = by_name.pop(output.request_id)
                    log.refused = is_refusal(output.stop_reason)
                    log.finished = not log.refused
                    self.finished.append(log)

    def _result(self, sampled: dict[str, list[int]]) -> Any:
        """Return what the model runner answers with."""
        return build_output(sampled)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Leave the cyclic collector out: it walks every live token list for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
