"""One small class per scheduler: what it wants of the next step.

Paper: Agrawal et al., Sarathi-Serve, OSDI'24 (arXiv 2403.02310): section 4 for its own batches, section 2 and
figure 5 for those of the schedulers that it is compared with, section 5.4 for the ablations.
"""

from typing import Protocol

from vllm_sarathi.core.views import StepPlan, StepRecord, StepView


class Policy(Protocol):
    """A scheduler's decision, with no state of the engine in it.

    Attributes:
        waiting_seen: how many waiting requests it wants to see, from the head of the queue.
        sees_one_step: whether those that would fill a step are enough; each one seen costs time in every step.
        needs_decode_views: whether it wants to see each decode.
        shortest_first_of: so many prompts that came during the same step are read shortest first; 0 leaves any number
            in the queue's own order.
    """

    waiting_seen: int
    sees_one_step: bool
    needs_decode_views: bool
    shortest_first_of: int

    def plan(self, view: StepView) -> StepPlan:
        """Decide the next step."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        ...


def arrival_order(view: StepView) -> tuple[int, ...]:
    """Return indices into `view.prefills` in the queue's own order; ties keep the engine's order."""
    if len(view.prefills) < 2:
        return tuple(range(len(view.prefills)))
    return tuple(sorted(range(len(view.prefills)), key=lambda i: view.prefills[i].rank))


class FixedBudget:
    """Stall-free batching with a fixed budget (section 4.3): decodes, then partial prefills, then new ones.

    Decodes count against the budget: where it is smaller than what they need they take turns, and
    prefills wait until some have finished (no new decode can appear meanwhile, so that is bounded).
    """

    waiting_seen = 0
    sees_one_step = True
    needs_decode_views = False
    shortest_first_of = 0

    def __init__(self, token_budget: int) -> None:
        assert token_budget >= 1
        self._token_budget = token_budget

    def plan(self, view: StepView) -> StepPlan:
        return StepPlan(
            token_budget=min(self._token_budget, view.max_tokens),
            prefill_order=arrival_order(view),
            reason="fixed",
        )

    def observe(self, record: StepRecord) -> None:
        """A fixed budget learns nothing."""


class Baseline:
    """What the schedulers below have in common: they see some of the queue, and learn nothing."""

    waiting_seen = 64
    sees_one_step = False
    needs_decode_views = False
    shortest_first_of = 0

    def observe(self, record: StepRecord) -> None:
        """A baseline learns nothing."""


def whole_prompts(view: StepView, room: int) -> int:
    """Return the tokens of the first prompts that are read whole within `room`.

    Those that are partly read come first. A prompt that no step could hold is cut.
    """
    total = 0
    for request in (*(view.prefills[i] for i in arrival_order(view)), *view.waiting):
        if total + request.remaining_tokens > room:
            return total if total else max(0, room)
        total += request.remaining_tokens
    return total


def decodes_only(view: StepView, reason: str = "decodes") -> StepPlan:
    """Return the plan of a step without prefill."""
    return StepPlan(
        token_budget=min(view.max_tokens, max(1, view.decode_tokens)),
        prefill_order=(),
        held=tuple(range(len(view.prefills))),
        admit=False,
        reason=reason,
    )


class PrefillFirst(Baseline):
    """vLLM before V1: whole waiting prompts while their sum fits, and every decode stalls meanwhile."""

    def plan(self, view: StepView) -> StepPlan:
        tokens = whole_prompts(view, view.max_tokens)
        if tokens == 0:
            return decodes_only(view)
        return StepPlan(tokens, arrival_order(view), decodes=False, reason="prompts")


class Orca(Baseline):
    """Orca (OSDI'22): all decodes and all whole prompts that can be let in, in one step."""

    def plan(self, view: StepView) -> StepPlan:
        tokens = view.decode_tokens + whole_prompts(view, view.max_tokens - view.decode_tokens)
        return StepPlan(min(view.max_tokens, max(1, tokens)), arrival_order(view), reason="whole")


class RequestLevel(Baseline):
    """FasterTransformer: a batch runs to its end before the next is let in."""

    def plan(self, view: StepView) -> StepPlan:
        if view.decodes:
            return decodes_only(view)
        tokens = whole_prompts(view, view.max_tokens)
        return StepPlan(max(1, tokens), arrival_order(view), reason="batch")


class Pressure(Baseline):
    """P-PAS (arXiv 2608.15171, vLLM RFC 52906): two levels of prefill, by how many prompts press."""

    waiting_seen = 2
    prefill_tokens = 2048

    def plan(self, view: StepView) -> StepPlan:
        presses = view.decodes > 0 and len(view.prefills) + len(view.waiting) >= 2
        budget = view.decode_tokens + self.prefill_tokens if presses else view.max_tokens
        return StepPlan(
            min(view.max_tokens, budget), arrival_order(view), reason="high" if presses else "low"
        )


class ChunkedOnly(Baseline):
    """The ablation without hybrid batches: chunks and decodes in turn (section 5.4)."""

    waiting_seen = 1

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget
        self._decodes_next = False

    def plan(self, view: StepView) -> StepPlan:
        prompts = bool(view.prefills or view.waiting)
        if view.decodes and (self._decodes_next or not prompts):
            self._decodes_next = False
            return decodes_only(view)
        self._decodes_next = True
        return StepPlan(
            min(self._token_budget, view.max_tokens), arrival_order(view), decodes=False, reason="chunk"
        )


class HybridOnly(Baseline):
    """The ablation without chunks (section 5.4): decodes beside prompts, up to the engine's limit."""

    waiting_seen = 0

    def plan(self, view: StepView) -> StepPlan:
        return StepPlan(view.max_tokens, arrival_order(view), reason="hybrid")
