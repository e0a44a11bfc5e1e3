"""Stall-free batching with a fixed budget (Sarathi-Serve, arXiv 2403.02310, section 4.3): `--token-budget`.

Decodes, then partial prefills, then new prompts. Decodes count against the budget: where it is smaller than what they
need they take turns, and prefills wait until some have finished (no new decode can appear meanwhile, so that is
bounded).
"""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class FixedBudget(Baseline):
    """Plans every step with the same token budget."""

    waiting_seen = 1

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        return turn.plan(view, self.room(view, turn.prompts(view), view.decode_tokens), Reason.FIXED)
