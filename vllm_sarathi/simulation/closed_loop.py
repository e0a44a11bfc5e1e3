"""A closed loop: a number of clients, each of whom sends its next request when its last one has been answered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sarathi.simulation.simulator import RequestLog, Simulator, StepTimes
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Frontend:
    """What is outside of the engine: HTTP, and a tokenizer that reads one prompt after the other.

    Attributes:
        request_s: of a request, there and back.
        token_s: of each token of its prompt.
    """

    request_s: float = 0.0
    token_s: float = 0.0


class ClosedLoop(Simulator):
    """One engine core whose clients wait for their answers; see `Simulator`.

    Args:
        scheduler, times, in_flight: as those of `Simulator`.
        requests: in the order in which they are sent; when they arrive is not read.
        concurrency: clients; all of them send their first request at once.
        frontend: what is between them and the engine.
    """

    def __init__(
        self,
        scheduler: Any,
        times: StepTimes,
        requests: Sequence[SimulatedRequest],
        concurrency: int,
        frontend: Frontend,
        in_flight: int = 1,
    ) -> None:
        super().__init__(scheduler, times, requests, in_flight)
        self.sent_s: list[float] = []
        self._frontend = frontend
        self._tokenizer_free_s = 0.0
        for log in self.logs:
            log.request = replace(log.request, arrival_s=float("inf"))
        self._send(min(concurrency, len(requests)))

    def _send(self, count: int) -> None:
        for log in self.logs[len(self.sent_s) : len(self.sent_s) + count]:
            start_s = max(self.now_s + self._frontend.request_s, self._tokenizer_free_s)
            self._tokenizer_free_s = start_s + self._frontend.token_s * log.request.prompt_tokens
            log.request = replace(log.request, arrival_s=self._tokenizer_free_s)
            self.sent_s.append(self.now_s)

    def _finish(self, batch: Any) -> None:
        answered = len(self.finished)
        super()._finish(batch)
        self._send(len(self.finished) - answered)

    def answered(self) -> list[tuple[float, RequestLog]]:
        """Return when each request that has been answered was sent, and its log, in the order of sending."""
        return [(sent_s, log) for sent_s, log in zip(self.sent_s, self.logs, strict=False) if log.finished]
