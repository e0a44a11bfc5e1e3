"""One small class per scheduler: what it wants of the next step.

Paper: Agrawal et al., Sarathi-Serve, OSDI'24 (arXiv 2403.02310), section 4.
"""

from typing import Protocol

from vllm_sarathi.core.views import StepPlan, StepRecord, StepView


class Policy(Protocol):
    """A scheduler's decision, with no state of the engine in it.

    Attributes:
        waiting_seen: how many waiting requests it wants to see, from the head of the queue.
        needs_decode_views: whether it wants to see each decode.
    """

    waiting_seen: int
    needs_decode_views: bool

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
    needs_decode_views = False

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
