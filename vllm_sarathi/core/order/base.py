"""What an order answers, and what it wants to see."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.types import UNSEEN, Reason, RequestView, StepPlan, StepRecord, StepView

ANSWERING_SEEN = 32
"""How many are looked at of those that were preempted in the middle of an answer, however many wait."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it is in a step.

    Attributes:
        prefills: indices into StepView.prefills, first served first.
        held: indices of those that yield this step; they keep their blocks and their slot.
        waiting: indices into StepView.waiting, first let in first; None leaves the queue as it is.
        let_in: how many of the waiting, at the most, have their turn; None for all, those out of sight too.
        overdue: names of those that must be begun now, whatever else would keep them waiting.
        left_out: names of those that are not to be let in now; they stand last.
    """

    prefills: tuple[int, ...]
    held: tuple[int, ...] = ()
    waiting: tuple[int, ...] | None = None
    let_in: int | None = None
    overdue: Set[str] = frozenset()
    left_out: Set[str] = frozenset()

    def prompts(self, view: StepView) -> list[RequestView]:
        """Return whose turn it is, in order; a last one stands for those out of sight, of which nothing is known."""
        waiting = self.waiting if self.waiting is not None else range(len(view.waiting))
        slots = view.free_slots if self.let_in is None else min(self.let_in, view.free_slots)
        prompts = [view.prefills[i] for i in self.prefills]
        prompts += [view.waiting[i] for i in waiting[:slots]]
        if view.unseen_waiting and self.let_in is None and slots > len(view.waiting):
            prompts.append(RequestView(UNSEEN, (0.0, 0.0), 0.0, 0, view.max_tokens))
        return prompts

    def plan(
        self,
        view: StepView,
        token_budget: int,
        reason: Reason,
        decodes: bool = True,
        let_in: int | None = None,
    ) -> StepPlan:
        """Return the plan of a step in this order."""
        bounds = [bound for bound in (let_in, self.let_in) if bound is not None]
        return StepPlan(
            token_budget=min(view.max_tokens, max(1, token_budget)),
            prefill_order=self.prefills,
            held=self.held,
            waiting_order=self.waiting,
            let_in=min(bounds) if bounds else None,
            decodes=decodes,
            reason=reason,
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a waiting request for as long as it waits.

    Attributes:
        arrival_s: when it arrived, seconds since the epoch.
        remaining_tokens: tokens left to prefill.
        ttft_slo_s: its time-to-first-token SLO, seconds; None without one.
        slo_class, tag, tenant: as in `classes.Bond`.
        answering: whether it was preempted in the middle of an answer.
    """

    arrival_s: float
    remaining_tokens: int
    ttft_slo_s: float | None
    slo_class: SloClass | None = None
    tag: float = 0.0
    tenant: str = ""
    answering: bool = False


class Order(Protocol):
    """Decides whose prompt is prefilled first.

    Attributes:
        sees_one_step: whether those that would fill a step are enough to see.
        lists: for an order that looks beyond the head of the queue, how many to see of each of its sorted lists; empty
            where the queue's own order is kept.
    """

    sees_one_step: bool
    lists: Mapping[str, int]

    def keys(self, facts: Facts) -> Mapping[str, float]:
        """Return a request's key in each of the lists that it belongs to; it does not change while it waits."""
        ...

    def starts(self, wall_s: float) -> Mapping[str, float]:
        """Return from which key on a list is of interest, for those lists that have such a bound."""
        ...

    def turn(self, view: StepView) -> Turn:
        """Return whose turn it is in the step at hand."""
        ...

    def presses(self, bond: Bond, age_s: float, request_id: str, answering: bool) -> bool:
        """Return whether nobody may pass a request that waits for KV blocks: others would go on taking them.

        Args:
            bond, request_id: of the request.
            age_s: seconds since it arrived.
            answering: as in `Facts`.
        """
        ...

    def planned(self, prefill_tokens: int) -> None:
        """Note what the step whose turns were asked for last is going to prefill."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        ...

    def longest_step_s(self, decode_step_s: float, tbt_slo_s: float | None) -> float:
        """Return how long a step may take for the sake of those who arrive while it runs; infinite for any time.

        Args:
            decode_step_s: how long decodes alone take, seconds; 0 where that is not known.
            tbt_slo_s: the time-between-tokens SLO, seconds; None where there is none yet.
        """
        ...


class QueueOrder:
    """What orders have in common that ask nothing of the lists, and learn nothing."""

    sees_one_step = True
    lists: Mapping[str, int] = {}

    def keys(self, facts: Facts) -> Mapping[str, float]:
        """Return no keys."""
        return {}

    def starts(self, wall_s: float) -> Mapping[str, float]:
        """Return no bounds."""
        return {}

    def presses(self, bond: Bond, age_s: float, request_id: str, answering: bool) -> bool:
        """Return true: in the order of arrival nobody passes."""
        return True

    def planned(self, prefill_tokens: int) -> None:
        """Nothing depends on it."""

    def observe(self, record: StepRecord) -> None:
        """Nothing is learnt."""

    def longest_step_s(self, decode_step_s: float, tbt_slo_s: float | None) -> float:
        """Return infinity: a new request waits for the step to end, however long it is."""
        return math.inf


def turn_by_keys(view: StepView, keys: Sequence[tuple[float, ...]]) -> Turn:
    """Return the turn in which the smallest key goes first.

    Args:
        view: the step.
        keys: of all prefills, then of all waiting requests.

    A prompt in flight yields to a more urgent one that waits and could use the turn; who is less urgent than that
    prompt does not get it. But what it is about to read may be the other's prefix, too: then it is as urgent as that
    one, which would read the same again. (Nothing gives way to batch work, so nobody waits for what that reads.)
    """
    partial, waiting = list(keys[: len(view.prefills)]), keys[len(view.prefills) :]
    for request, key in zip(view.waiting, waiting, strict=True):
        if (reader := request.reader) is None or view.free_slots < 1:
            continue
        if request.batch or not view.prefills[reader].batch:
            partial[reader] = min(partial[reader], key)
    order = sorted(range(len(partial)), key=partial.__getitem__)
    waiting_order = tuple(sorted(range(len(waiting)), key=waiting.__getitem__))
    first = min(waiting, default=None) if view.free_slots > 0 else None
    held = tuple(i for i in order if first is not None and first < partial[i])
    if not held:
        return Turn(tuple(order), waiting=waiting_order)
    served = tuple(i for i in order if i not in held)
    most_urgent = min(partial[i] for i in held)
    return Turn(served, held, waiting_order, sum(key < most_urgent for key in waiting))
