"""The ablation without chunks (Sarathi-Serve, arXiv 2403.02310, section 5.4)."""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class HybridOnly(Baseline):
    """Decodes beside prompts, up to the engine's limit."""

    waiting_seen = 0

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        return turn.plan(view, self.room(view, turn.prompts(view), view.decode_tokens), Reason.HYBRID)


make = HybridOnly
