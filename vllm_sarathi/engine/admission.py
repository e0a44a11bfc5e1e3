"""Refusals: requests whose SLO cannot be met get their answer at once, before any of them is read.

The engine core decides, as it alone knows the queue. A refused request leaves the queue before the step is scheduled
and is answered with that step, as an aborted one whose `stop_reason` says why; in the API server `engine.http` makes
an HTTP 429 of it."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.gate import Gate, Refusal
from vllm_sarathi.engine.vllm.internals import (
    engine_core_output_class,
    engine_core_outputs_class,
    request_status,
)
from vllm_sarathi.engine.vllm.prefix_cache import shared_tokens
from vllm_sarathi.engine.vllm.protocols import Request

REFUSED = "vllm_sarathi refused: "
"""What the `stop_reason` of a refused request begins with; what follows is JSON."""


def stop_reason(refusal: Refusal) -> str:
    """Return what a refused request's answer says; the predicted time is above the SLO when rounded, too."""
    ttft_slo_ms = round(refusal.ttft_slo_s * 1e3, 3)
    predicted_ms = max(math.ceil(refusal.predicted_s * 1e6) / 1e3, ttft_slo_ms + 0.001)
    return REFUSED + json.dumps(
        {
            "slo_class": refusal.class_name,
            "predicted_ttft_ms": round(predicted_ms, 3),
            "ttft_slo_ms": ttft_slo_ms,
            "retry_after_s": round(refusal.retry_after_s, 3),
        }
    )


def sentence(why: Mapping[str, Any]) -> str:
    """Return what a client reads of the JSON of `stop_reason`."""
    return (
        f"The SLO of class {why['slo_class']} cannot be met now: a first token is predicted after "
        f"{why['predicted_ttft_ms']:.10g} ms, and {why['ttft_slo_ms']:.10g} ms is the SLO."
    )


def is_refusal(reason: object) -> bool:
    """True for the `stop_reason` of a refused request."""
    return isinstance(reason, str) and reason.startswith(REFUSED)


class Admissions:
    """Asks the gate for each request that arrives, and answers those that are refused.

    Args:
        scheduler: vLLM's, and ours.
        gate: decides.
        bond: returns what a request is bound to.
        cached_tokens: returns how many leading tokens of a waiting request are in the prefix cache.

    Attributes:
        refused: how many have been refused.
    """

    def __init__(
        self,
        scheduler: Any,
        gate: Gate,
        bond: Callable[[Request], Bond],
        cached_tokens: Callable[[Request], int],
    ) -> None:
        self.refused = 0
        self._scheduler = scheduler
        self._gate = gate
        self._bond = bond
        self._cached_tokens = cached_tokens
        self._new: list[str] = []
        self._next_look_s = float("inf")
        self._answers: list[tuple[Request, Refusal]] = []

    def added(self, request: Request) -> None:
        """Note a new request; it is judged when the next step is scheduled."""
        if self._bond(request).ttft_slo_s is not None:
            self._new.append(request.request_id)

    def ended(self, request: Request) -> None:
        """Forget a request that has ended."""
        self._gate.left(request.request_id)

    def judge(self, wall_s: float) -> None:
        """Take out of the queue who cannot be kept; called before a step is planned."""
        if not self._new and wall_s < self._next_look_s:
            return
        gate, requests = self._gate, self._scheduler.requests
        self.note_progress()
        refused = gate.review(wall_s)
        idle = not gate.standing and self.idle()
        for name in self._new:
            request = requests.get(name)
            if request is None or request.is_finished():
                continue
            admitted = (requests[each] for each in gate.standing if each in requests)
            done = max(self._cached_tokens(request), shared_tokens(self._scheduler, request, admitted))
            left = max(1, request.num_tokens - done)
            refusal = gate.ask(name, self._bond(request), request.arrival_time, wall_s, left, done, idle)
            if refusal is not None:
                refused[name] = refusal
        self._new.clear()
        if refused:
            self._refuse(refused)
        self._next_look_s = gate.next_look_s(wall_s)

    def idle(self) -> bool:
        """True where nobody runs but batch work, which gives way."""
        return all(self._bond(request).batch for request in self._scheduler.running)

    def note_progress(self) -> None:
        """Tell the gate how far those that it has let in have been read."""
        gate, requests = self._gate, self._scheduler.requests
        for name in gate.standing:
            request = requests.get(name)
            if request is None or request.num_output_tokens or request.num_output_placeholders:
                gate.left(name)
            elif done := request.num_computed_tokens:
                gate.prefilled(
                    name, done, request.num_tokens - done, request.status is request_status().RUNNING
                )

    def _refuse(self, refused: dict[str, Refusal]) -> None:
        finished = self._scheduler.finish_requests(set(refused), request_status().FINISHED_ABORTED)
        self._answers += [(request, refused[request.request_id]) for request in finished]
        self.refused += len(finished)
        if self._scheduler.telemetry is not None:
            for request in finished:
                self._scheduler.telemetry.count("refused_requests", refused[request.request_id].class_name)

    def answer(self, result: Any) -> None:
        """Add the answers to those who were refused to what the parent answers."""
        answers, self._answers = self._answers, []
        for request, refusal in answers:
            output = engine_core_output_class()(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=stop_reason(refusal),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs = result.get(request.client_index)
            if outputs is None:
                outputs = result[request.client_index] = engine_core_outputs_class()()
            outputs.outputs.append(output)
