"""`sjf`: the prompt with the fewest tokens left first, so that prompts wait the least on average.

A prompt that has waited for `max_wait_s` goes before all others in every second step that holds prefill, so it has its
first token no later than `max_wait_s` plus twice the time to prefill it and those that arrived before it. Before all of
them go those that were preempted in the middle of an answer: their next token is late already, and nobody takes the KV
blocks that they wait for.
"""

from collections.abc import Mapping

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.order.base import ANSWERING_SEEN, Facts, QueueOrder, Turn, turn_by_keys
from vllm_sarathi.core.types import StepView

OLDEST_SEEN = 8
SHORTEST_SEEN = 32


class ShortestFirst(QueueOrder):
    """Orders prompts by the tokens left.

    Args:
        max_wait_s: the bound on waiting, seconds.
    """

    sees_one_step = False
    lists: Mapping[str, int] = {
        "answering": ANSWERING_SEEN,
        "arrival": OLDEST_SEEN,
        "length": SHORTEST_SEEN,
    }

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._overdue_first = True

    def keys(self, facts: Facts) -> Mapping[str, float]:
        """Return when it arrived, and its length."""
        keys = {"arrival": facts.arrival_s, "length": float(facts.remaining_tokens)}
        return {**keys, "answering": facts.arrival_s} if facts.answering else keys

    def presses(self, bond: Bond, age_s: float, request_id: str, answering: bool) -> bool:
        """Return whether a request is in the middle of an answer, or has waited for its bound."""
        return answering or age_s >= self._max_wait_s

    def turn(self, view: StepView) -> Turn:
        """Return whose turn it is in the step at hand."""
        keys: list[tuple[float, ...]] = []
        for request in (*view.prefills, *view.waiting):
            if request.answering:
                keys.append((-1.0, -request.age_s))
            elif self._overdue_first and request.age_s >= self._max_wait_s:
                keys.append((0.0, -request.age_s))
            else:
                keys.append((1.0, request.remaining_tokens, -request.age_s))
        return turn_by_keys(view, keys)

    def planned(self, prefill_tokens: int) -> None:
        """Give those that are overdue every second step."""
        if prefill_tokens > 0:
            self._overdue_first = not self._overdue_first
