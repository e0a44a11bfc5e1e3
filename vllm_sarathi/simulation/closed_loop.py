"""A closed loop: so many clients, each of whom sends its next request when its last one has been answered."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_sarathi.simulation.simulator import Simulator, StepTimes
from vllm_sarathi.simulation.workload import SimulatedRequest


class ClosedLoop(Simulator):
    """One engine core whose clients wait for their answers; see `Simulator`.

    Args:
        scheduler, times, in_flight: as those of `Simulator`.
        requests: in the order in which they are sent; when they arrive is not read.
        concurrency: clients.
        outside_s: what a request spends outside the engine, there and back.
    """

    def __init__(
        self,
        scheduler: Any,
        times: StepTimes,
        requests: Sequence[SimulatedRequest],
        concurrency: int,
        outside_s: float = 0.0,
        in_flight: int = 1,
    ) -> None:
        first = [replace(request, arrival_s=0.0) for request in requests[:concurrency]]
        super().__init__(scheduler, times, [*first, *requests[concurrency:]], in_flight)
        self._outside_s = outside_s
        self._sent = len(first)
        for log in self.logs[self._sent :]:
            log.request = replace(log.request, arrival_s=float("inf"))

    def _finish(self, batch: Any) -> None:
        answered = len(self.finished)
        super()._finish(batch)
        for log in self.logs[self._sent : self._sent + len(self.finished) - answered]:
            log.request = replace(log.request, arrival_s=self.now_s + self._outside_s)
            self._sent += 1
