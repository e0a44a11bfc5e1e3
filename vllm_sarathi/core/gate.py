"""The gate: whether a request's SLO can be met, asked when it arrives and again as long as its prefill has not begun.

It knows every prompt with an SLO that has no first token yet. A newcomer is refused, if its class says so, when
`when_first_token` exceeds its SLO: by its own deadline, or because it would make one late that was admitted before. If
prefill then is slower than expected, and not all admitted requests would be in time, some of them are refused after
all: as few as possible, the longest, and only those whose prefill has not begun (`first_token.keep`). They are judged
as a newcomer is, so the time that a client is told is the one that decided, and is above the SLO.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.first_token import Job, QueueView, by_deadline, keep, when_first_token

LEAST_RETRY_S = 1.0

MOST_CAUTION, LONG_S = 0.15, 2.0
"""For admitted requests, prefill is assumed to be slower than it has been: by this fraction if the SLO is at least this
long, seconds, and by less the shorter it is, because the pace changes with the running decodes. A newcomer is judged
without it: if it is admitted and cannot be kept, it is refused while it waits, and more requests meet their SLO. With
all of it at any SLO, a fifth of those refused at 300 ms could have been kept; with none, or with less as the deadline
comes near, fewer requests meet an SLO of 2 s (seeds 0 to 3)."""

LEAD_STEPS = 1.5
"""A prompt waits for the end of the step in which the last of it is prefilled, a part of which may be another's; its
age includes what it has waited of the present step. With 3, as many as half of the refused could have been kept if the
SLO is a few steps (300 ms, steps of 20; seeds 0 to 2), and no more of the admitted ones were."""

HOPELESS = 1.5
"""On an idle device a prompt is refused if prefilling it would take this multiple of the SLO. Below that it is
admitted: it delays no other, and only prompts that are prefilled show what a prompt takes."""

Pace = tuple[float, float, float]
"""Seconds of prefill per token, those of attention per token pair, and the lead, as QueueView has them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told.

    Attributes:
        class_name: of the request.
        predicted_s: when its first token would come, seconds after it arrived.
        ttft_slo_s: the time to first token that its class has as its SLO, seconds.
    """

    class_name: str
    predicted_s: float
    ttft_slo_s: float

    @property
    def retry_after_s(self) -> float:
        """After how many seconds a request like it could be kept, as far as is known now."""
        return max(LEAST_RETRY_S, self.predicted_s - self.ttft_slo_s)


@dataclass(slots=True)
class _Standing:
    bond: Bond
    arrival_s: float
    done: int
    left: int
    begun: bool = False

    @property
    def ttft_slo_s(self) -> float:
        ttft_slo_s = self.bond.ttft_slo_s
        assert ttft_slo_s is not None
        return ttft_slo_s

    @property
    def slo_class(self) -> SloClass:
        assert self.bond.slo_class is not None
        return self.bond.slo_class

    @property
    def refusable(self) -> bool:
        return self.slo_class.when_late == "refuse" and not self.begun

    @property
    def caution(self) -> float:
        """The factor by which prefill is assumed to be slower than it has been."""
        return 1.0 + MOST_CAUTION * min(1.0, self.ttft_slo_s / LONG_S)


class Gate:
    """Keeps the list of the prompts with an SLO.

    Args:
        pace: returns how fast prompts are prefilled; None while nothing is known: then nobody is refused.
        pace_alone: returns how fast a prompt of a length is prefilled on an idle device.
    """

    def __init__(
        self, pace: Callable[[], Pace | None], pace_alone: Callable[[int], Pace | None] = lambda tokens: None
    ) -> None:
        self._pace = pace
        self._pace_alone = pace_alone
        self._standing: dict[str, _Standing] = {}

    @property
    def standing(self) -> tuple[str, ...]:
        """The names of all that have an SLO and no first token yet."""
        return tuple(self._standing)

    def ask(
        self,
        request_id: str,
        bond: Bond,
        arrival_s: float,
        now_s: float,
        tokens: int,
        done: int,
        idle: bool = False,
    ) -> Refusal | None:
        """Let a newcomer in, and return None; or refuse it.

        Args:
            request_id, bond: whose it is, and what it is bound to.
            arrival_s, now_s: when it arrived and now, on one clock.
            tokens: of its prompt that are to be prefilled.
            done: of its prompt that are in the prefix cache.
            idle: whether nobody runs but batch work.
        """
        if bond.ttft_slo_s is None or bond.slo_class is None or bond.batch:
            return None
        newcomer = _Standing(bond, arrival_s, done, tokens)
        idle = idle and not self._standing
        refuses = bond.slo_class.when_late == "refuse"  # else nothing has to be predicted
        if refuses and (queue := self.queue(now_s, tokens if idle else None)) is not None:
            refusal = _refusal(queue, newcomer, now_s)
            if refusal is not None and (not idle or refusal.predicted_s > HOPELESS * refusal.ttft_slo_s):
                return refusal
        self._standing[request_id] = newcomer
        return None

    def prefilled(self, request_id: str, done: int, left: int, runs: bool = False) -> None:
        """Note how far a prompt has been prefilled.

        Args:
            request_id: whose.
            done, left: its tokens that are prefilled, or in the prefix cache, and those that are not.
            runs: whether it has been admitted to run: then some of it is prefilled, even if less is in the prefix
                cache than on its arrival.
        """
        if (standing := self._standing.get(request_id)) is not None:
            standing.begun = standing.begun or runs or done > standing.done
            standing.done, standing.left = done, left

    def left(self, request_id: str) -> None:
        """Note that a request has its first token, or has ended."""
        self._standing.pop(request_id, None)

    def review(self, now_s: float) -> dict[str, Refusal]:
        """Return the admitted requests that have to be refused after all, and forget them."""
        line = self._line(now_s, cautious=True) if self._may_refuse() else None
        if line is None:
            return {}
        queue, standing = line
        kept = keep(queue.jobs, queue.lead_s)
        given_up = [i for i in set(range(len(standing))).difference(kept) if standing[i][1].refusable]
        jobs = [queue.jobs[index] for index in kept]
        refused = {}
        for index in sorted(given_up, key=lambda i: -queue.jobs[i].loss):
            name, each = standing[index]
            slower = queue.slower(each.caution)
            refusal = _refusal(replace(slower, jobs=tuple(jobs)), each, now_s)
            if refusal is None:  # it was given up for one that may be late, or is given up itself
                jobs.append(queue.jobs[index])
            else:
                refused[name] = refusal
                del self._standing[name]
        return refused

    def next_look_s(self, now_s: float) -> float:
        """Return when one that was let in may have to be refused, at the earliest; infinite for never."""
        line = self._line(now_s, cautious=True) if self._may_refuse() else None
        if line is None:
            return math.inf
        queue = line[0]
        end_s, slack_s = queue.lead_s, math.inf
        for index in by_deadline(queue.jobs):
            end_s += queue.jobs[index].prefill_s
            slack_s = min(slack_s, queue.jobs[index].due_s - end_s)
        return now_s + max(slack_s, queue.lead_s)  # nobody is prefilled meanwhile, at the worst

    def _may_refuse(self) -> bool:
        return any(each.refusable for each in self._standing.values())

    def queue(self, now_s: float, idle_tokens: int | None = None) -> QueueView | None:
        """Return what a newcomer finds: what is to be prefilled, and how fast; None while nothing is known of that.

        Args:
            now_s: now, on the clock of arrivals.
            idle_tokens: of the newcomer's prompt, where nobody runs but batch work; else None.
        """
        if idle_tokens is not None and not self._standing:
            pace = self._pace_alone(idle_tokens)
            return None if pace is None else QueueView((), *pace)
        line = self._line(now_s)
        return None if line is None else line[0]

    def _line(
        self, now_s: float, cautious: bool = False
    ) -> tuple[QueueView, list[tuple[str, _Standing]]] | None:
        """Return what is to be prefilled, and whose each job is; if cautious, jobs take longer than by the pace."""
        if (pace := self._pace()) is None:
            return None
        token_s, work_s, lead_s = pace
        queue = QueueView((), token_s, work_s, LEAD_STEPS * lead_s)
        jobs, standing, rest_s = [], [], 0.0
        for name, each in self._standing.items():
            when_late = each.slo_class.when_late
            due_s = each.arrival_s + each.ttft_slo_s - now_s
            prefill_s = (each.caution if cautious else 1.0) * queue.prefill_s(each.left, each.done)
            if due_s <= 0 and when_late == "relegate":
                rest_s += prefill_s
                continue
            stays = when_late == "serve" or each.begun
            loss = each.slo_class.weight / prefill_s if prefill_s > 0 else math.inf
            jobs.append(Job(due_s, prefill_s, protected=when_late == "refuse", stays=stays, loss=loss))
            standing.append((name, each))
        return QueueView(tuple(jobs), queue.token_s, queue.work_s, queue.lead_s, rest_s), standing


def _refusal(queue: QueueView, asking: _Standing, now_s: float) -> Refusal | None:
    """Return the refusal of one whose first token would come after its SLO; None where it would not."""
    age_s = max(0.0, now_s - asking.arrival_s)
    predicted_s = age_s + when_first_token(queue, asking.left, asking.ttft_slo_s - age_s, asking.done)
    if predicted_s <= asking.ttft_slo_s:
        return None
    return Refusal(asking.slo_class.name, predicted_s, asking.ttft_slo_s)
