"""Stall-free batching with a fixed budget (Sarathi-Serve, arXiv 2403.02310, section 4.3): `--token-budget`.

Decodes, then partial prefills, then new prompts. Decodes count against the budget: where it is smaller than what they
need they take turns, and prefills wait until some have finished (no new decode can appear meanwhile, so that is
bounded).
"""

from vllm_sarathi.core.chunk_rules import ANYWHERE
from vllm_sarathi.core.limits.shape import least_chunk
from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class FixedBudget(Baseline):
    """Plans every step with the same token budget."""

    waiting_seen = 1

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        budget = self.room(view)
        first = next(iter(turn.prompts(view)), None)
        if first is not None and first.rules is not ANYWHERE:
            # What cannot be cut is above any budget, or it would never be prefilled.
            budget = max(budget, view.decode_tokens + least_chunk(first))
        return turn.plan(view, budget, Reason.FIXED)
