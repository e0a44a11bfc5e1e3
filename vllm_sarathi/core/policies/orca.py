"""Orca (OSDI'22), as Sarathi-Serve compares it (arXiv 2403.02310, section 2): hybrid batches of whole prompts."""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline, whole_prompts
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class Orca(Baseline):
    """All decodes and all whole prompts that can be let in, in one step."""

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        prompts = turn.prompts(view)
        room = self.room(view, prompts, view.decode_tokens)
        tokens = view.decode_tokens + whole_prompts(prompts, room - view.decode_tokens)
        return turn.plan(view, min(room, tokens), Reason.WHOLE)


make = Orca
