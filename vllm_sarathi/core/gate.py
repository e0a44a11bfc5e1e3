"""The gate: whether a request's promise can be kept, asked once when it arrives and again while nothing of it is read.

It knows every prompt under a promise that has no first token yet. A newcomer is refused, where its class says so, when
`when_first_token` comes to more than it is promised: by its own deadline, or because it would make one late that was
let in before. One that was let in and that even the whole device could not read in time any more is refused as well,
as long as nothing of it has been read."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.first_token import Job, QueueView, when_first_token

LEAST_RETRY_S = 1.0

CAUTION = 1.15
"""Reading is taken to be so many times slower than it has been: who is let in is to be kept."""

Pace = tuple[float, float, float]
"""Seconds of reading per token, those of attention per token pair, and the lead, as QueueView has them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told.

    Attributes:
        class_name: of the request.
        predicted_s: when its first token would come, seconds after it arrived.
        promised_s: the time to first token that its class promises, seconds.
    """

    class_name: str
    predicted_s: float
    promised_s: float

    @property
    def retry_after_s(self) -> float:
        """After how many seconds a request like it could be kept, as far as is known now."""
        return max(LEAST_RETRY_S, self.predicted_s - self.promised_s)


@dataclass(slots=True)
class _Standing:
    bond: Bond
    arrival_s: float
    done: int
    left: int
    begun: bool = False

    @property
    def promised_s(self) -> float:
        promised_s = self.bond.ttft_slo_s
        assert promised_s is not None
        return promised_s

    @property
    def refusable(self) -> bool:
        return (
            self.bond.slo_class is not None and self.bond.slo_class.when_late == "refuse" and not self.begun
        )

    def alone_s(self, pace: "Pace") -> float:
        """Return the seconds to its first token if nothing else were read."""
        token_s, work_s, lead_s = pace
        queue = QueueView((), token_s, work_s, lead_s)
        return when_first_token(queue, self.left, done_tokens=self.done)


class Gate:
    """Keeps the list of the prompts under a promise.

    Args:
        pace: returns how fast prompts are read; None while nothing is known: then nobody is refused.
    """

    def __init__(self, pace: Callable[[], Pace | None]) -> None:
        self._pace = pace
        self._standing: dict[str, _Standing] = {}

    @property
    def standing(self) -> tuple[str, ...]:
        """The names of all that are under a promise and have no first token yet."""
        return tuple(self._standing)

    def ask(
        self, request_id: str, bond: Bond, arrival_s: float, now_s: float, tokens: int, done: int
    ) -> Refusal | None:
        """Let a newcomer in, and return None; or refuse it.

        Args:
            request_id, bond: whose it is, and what it is bound to.
            arrival_s, now_s: when it arrived and now, on one clock.
            tokens: of its prompt that are to be read.
            done: of its prompt that are in the prefix cache.
        """
        if bond.ttft_slo_s is None or bond.slo_class is None or bond.batch:
            return None
        if bond.slo_class.when_late == "refuse" and (queue := self.queue(now_s)) is not None:
            age_s = max(0.0, now_s - arrival_s)
            wait_s = when_first_token(queue, tokens, bond.ttft_slo_s - age_s, done)
            if age_s + wait_s > bond.ttft_slo_s:
                return Refusal(bond.slo_class.name, age_s + wait_s, bond.ttft_slo_s)
        self._standing[request_id] = _Standing(bond, arrival_s, done, tokens)
        return None

    def read(self, request_id: str, done: int, left: int) -> None:
        """Note how far a prompt has been read."""
        if (standing := self._standing.get(request_id)) is not None:
            standing.begun = standing.begun or done > standing.done
            standing.done, standing.left = done, left

    def left(self, request_id: str) -> None:
        """Note that a request has its first token, or has ended."""
        self._standing.pop(request_id, None)

    def hopeless(self, request_id: str, now_s: float) -> Refusal | None:
        """Return the refusal of a request of which nothing is read and that cannot be in time any more; else None."""
        standing, pace = self._standing.get(request_id), self._cautious()
        if standing is None or pace is None or not standing.refusable:
            return None
        wait_s = now_s - standing.arrival_s + standing.alone_s(pace)
        if wait_s <= standing.promised_s:
            return None
        assert standing.bond.slo_class is not None
        return Refusal(standing.bond.slo_class.name, wait_s, standing.promised_s)

    def next_look_s(self) -> float:
        """Return when the next of them may be hopeless, on the clock of the arrivals; infinite for never."""
        if (pace := self._cautious()) is None:
            return math.inf
        last = [s.arrival_s + s.promised_s - s.alone_s(pace) for s in self._standing.values() if s.refusable]
        return min(last, default=math.inf)

    def _cautious(self) -> Pace | None:
        pace = self._pace()
        return None if pace is None else (CAUTION * pace[0], CAUTION * pace[1], pace[2])

    def queue(self, now_s: float) -> QueueView | None:
        """Return what is to be read, and how fast; None while nothing is known of that."""
        pace = self._cautious()
        if pace is None:
            return None
        token_s, work_s, lead_s = pace
        empty, jobs = QueueView((), token_s, work_s, lead_s), []
        for standing in self._standing.values():
            slo_class = standing.bond.slo_class
            assert slo_class is not None
            due_s = standing.arrival_s + standing.promised_s - now_s
            if due_s <= 0 and slo_class.when_late == "relegate":
                continue
            read_s = empty.read_s(standing.left, standing.done)
            stays = slo_class.when_late != "relegate"
            loss = slo_class.weight / read_s if read_s > 0 else math.inf
            jobs.append(Job(due_s, read_s, protected=slo_class.when_late == "refuse", stays=stays, loss=loss))
        return QueueView(tuple(jobs), token_s, work_s, lead_s)
