"""`fcfs`: the engine's own order, arrival; where vLLM schedules by priority, priority and then arrival."""

from vllm_sarathi.core.order.base import QueueOrder, Turn
from vllm_sarathi.core.types import StepView


class ArrivalOrder(QueueOrder):
    """First come, first served; a partly prefilled prompt yields to one of higher priority that waits."""

    def turn(self, view: StepView) -> Turn:
        """Return whose turn it is in the step at hand."""
        prefills = view.prefills
        order = tuple(sorted(range(len(prefills)), key=lambda i: prefills[i].rank))
        if not prefills or not view.waiting or view.free_slots < 1:
            return Turn(order)
        urgent = min(request.rank[0] for request in view.waiting)
        held = tuple(i for i in order if prefills[i].rank[0] > urgent)
        if not held:
            return Turn(order)
        least = min(prefills[i].rank[0] for i in held)
        let_in = sum(request.rank[0] < least for request in view.waiting)
        return Turn(tuple(i for i in order if i not in held), held, None, let_in)
