"""One engine core of a fleet: a simulator whose requests come one by one, and that a router may ask.

A router's question is answered as a live engine answers it: between two steps, by the same `Control`.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from vllm_sarathi.engine.vllm.transfers import Transfers, arrived, remote_prefill, transfers
from vllm_sarathi.simulation.simulator import RequestLog, Simulator, StepTimes, no_garbage_collection
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

Role = Literal["serve", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Carried:
    """A request on its way through a fleet.

    Attributes:
        number: its place in the workload.
        request: what its client asked for.
        scheduled_s: when its first token of prompt was scheduled; None before.
        token_s: when each token that the client has came.
        kv_s: when its KV, computed on another replica, is here; None where the prompt is to be read here.
    """

    number: int
    request: SimulatedRequest
    scheduled_s: float | None = None
    token_s: tuple[float, ...] = ()
    kv_s: float | None = None

    def asked_at(self, now_s: float, output_tokens: int | None = None) -> SimulatedRequest:
        """Return what is asked of a replica now: what has been generated elsewhere is prompt there."""
        request, done = self.request, len(self.token_s)
        left = request.output_tokens - done if output_tokens is None else output_tokens
        if now_s == request.arrival_s and not done and left == request.output_tokens:
            return request
        return SimulatedRequest(
            now_s,
            request.prompt_tokens + done,
            left,
            request.tbt_slo_ms,
            request.ttft_slo_ms,
            request.prefix,
            request.kind,
            request.tenant,
        )


class Answer(NamedTuple):
    """What a router sees of a replica.

    Attributes:
        replica: which.
        waiting_tokens: prompt tokens that are not read yet; of a replica that gets them read, all tokens that it has
            to do with.
        wait_s: seconds from the question until the first token of the prompt that was asked for; None where that is
            not known, or nothing was asked.
        kept: whether that is within the SLO; None without either.
    """

    replica: int
    waiting_tokens: int
    wait_s: float | None = None
    kept: bool | None = None


class Read(NamedTuple):
    """A prompt that has been read on one replica for another.

    Attributes:
        at_s: when.
        carried: the request.
        replica: where.
        refused: whether it was refused instead.
    """

    at_s: float
    carried: Carried
    replica: int
    refused: bool = False


@dataclass(slots=True, kw_only=True)
class CarriedLog(RequestLog):
    """What a replica answers of a request, and what it was before."""

    carried: Carried

    @property
    def client(self) -> RequestLog:
        """What the client saw, here and before."""
        carried = self.carried
        if self.request is carried.request:
            return self
        tokens = [*carried.token_s, *self.token_s]
        return RequestLog(carried.request, self.first_scheduled_s, tokens, self.finished, self.refused)

    @property
    def first_scheduled_s(self) -> float | None:
        """When its first token of prompt was scheduled, here or before."""
        return self.scheduled_s if self.carried.scheduled_s is None else self.carried.scheduled_s


class Replica(Simulator):
    """One engine core of a fleet; see `Simulator`.

    Args:
        index: its place in the fleet.
        scheduler, times, in_flight: as those of `Simulator`.
        role: `serve`; `prefill`, which reads prompts for others and answers none; or `decode`, which gets the KV of
            prompts that others have read.
    """

    more_may_come = True
    logs: list[CarriedLog]  # type: ignore[assignment]  # it is given no others
    finished: list[CarriedLog]  # type: ignore[assignment]

    def __init__(
        self, index: int, scheduler: Any, times: StepTimes, in_flight: int = 1, role: Role = "serve"
    ) -> None:
        super().__init__(scheduler, times, [], in_flight)
        self.index = index
        self.prefill_only = role == "prefill"
        self._link: Transfers | None = None
        if role == "decode":
            # From the first step on: a step that was scheduled without a connector tells of no KV.
            self._link = scheduler.connector = transfers()
        self._kv_s: dict[str, float] = {}
        self._unscheduled_tokens = 0
        self._told = 0
        self._until_s = 0.0

    def send(self, carried: Carried, now_s: float) -> None:
        """Take in a request; those of one replica come in the order of their times."""
        request = carried.asked_at(now_s, 1 if self.prefill_only else None)
        if carried.kv_s is None:
            self._unscheduled_tokens += request.prompt_tokens
        else:
            self._kv_s[str(len(self.logs))] = carried.kv_s
        self.logs.append(CarriedLog(request, carried=carried))

    def advance(self, until_s: float) -> None:
        """Step until the clock is there, or until there is nothing to do."""
        self._until_s = until_s
        with no_garbage_collection():
            while self.now_s < until_s and self.step():
                pass

    def drain(self) -> None:
        """Step until every request has finished."""
        self.more_may_come = False
        self.advance(float("inf"))

    def answer(self, asked_s: float, request: SimulatedRequest | None) -> Answer:
        """Return what a router sees that asked at a time; the answer comes when the step under way has ended."""
        waiting_tokens = self.waiting_tokens()
        if request is None:
            return Answer(self.index, waiting_tokens)
        later_s = max(0.0, self.now_s - asked_s)
        asked: dict[str, Any] = {"command": "first_token", "tokens": request.prompt_tokens}
        if request.ttft_slo_ms is not None:
            asked["ttft_slo_ms"] = request.ttft_slo_ms - later_s * 1e3
        said = json.loads(self.scheduler.control.answer(json.dumps(asked)))
        if said["status"] != 200:
            raise RuntimeError(f"replica {self.index} does not answer: {said['error']}")
        wait_s = None if said["wait_s"] is None else said["wait_s"] + later_s
        return Answer(self.index, waiting_tokens, wait_s, said["kept"])

    def waiting_tokens(self) -> int:
        """Return the prompt tokens that are not read yet; of one that reads none, all tokens that it has to do with."""
        if self._link is not None:
            return sum(request.num_tokens for request in self.scheduler.requests.values())
        partial = sum(
            r.num_tokens - r.num_computed_tokens for r in self.scheduler.running if r.is_prefill_chunk
        )
        return self._unscheduled_tokens + int(partial)

    def read(self) -> list[Read]:
        """Return the prompts that have been read for other replicas since the last call."""
        new, self._told = self.finished[self._told :], len(self.finished)
        return [
            Read(
                log.token_s[-1] if log.token_s else self.now_s,
                replace(log.carried, scheduled_s=log.first_scheduled_s, kv_s=None),
                self.index,
                log.refused,
            )
            for log in new
        ]

    def fail(self, at_s: float) -> list[Carried]:
        """Stop at a time; return those who had no whole answer, with the tokens that they have."""
        unfinished: list[Carried] = []
        ended: list[CarriedLog] = []
        for log in self.logs:
            came = [time_s for time_s in log.token_s if time_s <= at_s]
            if log.refused or (log.finished and len(came) == len(log.token_s)):
                ended.append(log)
                continue
            begun = log.scheduled_s is not None and log.scheduled_s <= at_s
            tokens = log.carried.token_s if self.prefill_only else (*log.carried.token_s, *came)
            scheduled_s = log.first_scheduled_s if begun else log.carried.scheduled_s
            unfinished.append(replace(log.carried, scheduled_s=scheduled_s, token_s=tokens, kv_s=None))
        self.logs = ended
        return unfinished

    def _begin(self, log: RequestLog) -> None:
        super()._begin(log)
        assert isinstance(log, CarriedLog)
        if log.carried.kv_s is None:
            self._unscheduled_tokens -= log.request.prompt_tokens

    def _asked_more(self, name: str) -> dict[str, Any]:
        return remote_prefill() if name in self._kv_s else {}

    def _arriving(self) -> list[tuple[float, str]]:
        """Return when the KV of those who have room for it comes, soonest first."""
        if self._link is None:
            return []
        return sorted((self._kv_s[name], name) for name in self._link.loading)

    def _result(self, sampled: dict[str, list[int]]) -> Any:
        result = super()._result(sampled)
        if self._link is not None and self._link.loading:
            here = [name for at_s, name in self._arriving() if at_s <= self.now_s]
            self._link.take(here)
            result.kv_connector_output = arrived(here)
        return result

    def _nap(self) -> None:
        """Wait for KV, where that is all that is waited for; else as the parent does."""
        arriving = self._arriving()
        if not arriving or self.scheduler.finished_recving_kv_req_ids:
            super()._nap()
            return
        self._naps = 0
        known = self.logs[self._next :][:1]
        self.now_s = max(
            self.now_s, min([arriving[0][0], self._until_s, *(log.request.arrival_s for log in known)])
        )
