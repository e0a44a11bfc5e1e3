"""If requests wait for slots or KV blocks, a step is no longer than suits the running requests that are to end.

With all slots or KV blocks taken, no request is admitted before an answer ends, and answers grow by one token per step,
however long the step is. Prefilling a chunk in two steps of half the size takes a little longer, and gives each stream
two tokens. The former delays the prompts that are prefilled; the latter saves the waiting requests a step of decodes
alone, which has to come anyway. With a decode step of d, a step of c tokens of T(c), p prompts in it and w requests
that wait for slots or blocks, it is worth it if

    w (d - a) > p a,    a = 2 T(c / 2) - T(c).
"""

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate, chunks_within
from vllm_sarathi.core.types import Reason, StepView

LEAST_TOKENS = 128
"""No step is halved below this."""


class Turnover:
    """Halves a step as long as those that wait for slots and blocks gain more than the prompts in it lose.

    Args:
        experience: what is known of the device.
    """

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        tokens = candidate.tokens
        if not view.blocked or not view.decodes or candidate.late or tokens < 2 * LEAST_TOKENS:
            return tokens, candidate.reason
        step_s, prompts = self._step(view, candidate, tokens)
        while tokens >= 2 * LEAST_TOKENS:
            half_s, fewer = self._step(view, candidate, tokens // 2)
            added_s = 2 * half_s - step_s
            if view.blocked * (candidate.decode_s - added_s) <= prompts * added_s:
                break
            tokens, step_s, prompts = tokens // 2, half_s, fewer
        return tokens, candidate.reason if tokens == candidate.tokens else Reason.TURNOVER

    def _step(self, view: StepView, candidate: Candidate, tokens: int) -> tuple[float, int]:
        """Return the predicted seconds of the step with `tokens` of its prefill, and the prompts in it."""
        taken, work, prompts, encoder = chunks_within(candidate.prompts, tokens)
        return self._experience.seconds(view, taken, work, prompts, encoder), prompts
