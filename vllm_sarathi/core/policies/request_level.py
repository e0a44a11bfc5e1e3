"""FasterTransformer, as Sarathi-Serve compares it (arXiv 2403.02310, section 2): request-level batches."""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline, decodes_only, whole_prompts
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class RequestLevel(Baseline):
    """A batch runs to its end before the next is let in."""

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        if view.decodes:
            return decodes_only(view)
        prompts = turn.prompts(view)
        return turn.plan(view, whole_prompts(prompts, self.room(view, prompts)), Reason.BATCH)


make = RequestLevel
