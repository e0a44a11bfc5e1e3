"""vLLM before V1, as Sarathi-Serve measured it (arXiv 2403.02310, section 2 and figure 5): prompts before decodes."""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline, decodes_only, whole_prompts
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class PrefillFirst(Baseline):
    """Whole waiting prompts while their sum fits, and every decode stalls meanwhile."""

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        prompts = turn.prompts(view)
        tokens = whole_prompts(prompts, self.room(view, prompts))
        if tokens == 0:
            return decodes_only(view)
        return turn.plan(view, tokens, Reason.PROMPTS, decodes=False)


make = PrefillFirst
