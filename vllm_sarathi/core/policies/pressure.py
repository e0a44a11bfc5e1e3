"""P-PAS (arXiv 2608.15171, vLLM RFC 52906): two levels of prefill, by how many prompts press."""

from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Baseline
from vllm_sarathi.core.types import Reason, StepPlan, StepView


class Pressure(Baseline):
    """2,048 prefill tokens while something decodes and two prompts press; else the engine's limit."""

    waiting_seen = 2
    prefill_tokens = 2048

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        presses = view.decodes > 0 and len(view.prefills) + len(view.waiting) >= 2
        room = self.room(view, turn.prompts(view), view.decode_tokens)
        budget = view.decode_tokens + self.prefill_tokens if presses else room
        return turn.plan(view, min(room, budget), Reason.HIGH if presses else Reason.LOW)


make = Pressure
