"""A request is admitted by what the batch will cost until its answers end, and not by what it costs now.

Contexts grow by a token in every step, and shrink by a whole request when an answer ends. Take n requests that read C
tokens of context, whose answers have m tokens on average and unknown ends (a memoryless length). After t steps
n exp(-t/m) of them are left, and they read (C + n t) exp(-t/m). The costliest moment is held within the SLO, with room
for chance: while no request is admitted, the contexts are a random walk that falls, since answers end together with
their prompts, and it rises by more than a few (p + m)^2 / p only rarely (Lundberg's inequality; p is the length of a
prompt). If prompts are short and answers long, that walk hardly falls; but then n requests deviate from their
expectation by no more than a few (p + m) sqrt(n), however far ahead one looks.

So decodes alone stay within the SLO. Prompts that cannot be admitted for that reason wait for answers to end. One that
has waited for `max_wait_s` is admitted all the same, and then the gaps give way. So they wait where decodes are late
already because they are too many: to let in everybody else would leave them late for good.
"""

import math
from collections.abc import Sequence

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.types import Reason, RequestView, StepView

MEMORY = 0.98
"""Weight of an answer's length against that of the one after it: the memory is about 50 answers."""

LEAST_ANSWERS = 8
"""What so few answers say of the next ones is not believed."""

MOMENTS = (0.0, 0.25, 0.5, 1.0)
"""When the batch is looked at, in mean lengths of an answer from now."""

CHANCE = 1.0
DEVIATIONS = 2.0
"""How much of (p + m)^2 / p, and of (p + m) sqrt(n), is left free for chance: the smaller of the two."""


class Answers:
    """Learns how long prompts and answers are on average, per deployment."""

    def __init__(self) -> None:
        self._weight = self._prompts = self._answers = 0.0
        self._most: dict[str, int] = {}
        self._most_sum = 0

    def take_over(self, previous: "Answers") -> None:
        """Become, in place, what another has learnt: the limits hold this object."""
        vars(self).update(vars(previous))

    def arrived(self, request_id: str, most_tokens: int) -> None:
        """Take in a request whose answer has `most_tokens` at the most."""
        self._most_sum += most_tokens - self._most.get(request_id, 0)
        self._most[request_id] = most_tokens

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Take in a request that has ended."""
        self._most_sum -= self._most.pop(request_id, 0)
        if not answer_tokens:  # nobody has waited for its answer
            return
        self._weight = MEMORY * self._weight + 1.0
        self._prompts = MEMORY * self._prompts + prompt_tokens
        self._answers = MEMORY * self._answers + answer_tokens

    @property
    def known(self) -> bool:
        """Whether enough have ended."""
        return self._weight >= LEAST_ANSWERS - 1

    @property
    def mean_tokens(self) -> float:
        """The mean length of an answer, tokens: what was learnt, and no longer than those that are there may be."""
        learnt = self._answers / self._weight
        return min(learnt, self._most_sum / len(self._most)) if self._most else learnt

    def chance_tokens(self, count: int) -> float:
        """Return the tokens of context that chance may add to those of `count` requests while nobody is let in."""
        prompt = max(1.0, self._prompts / self._weight)
        length = prompt + self.mean_tokens
        return min(CHANCE * length**2 / prompt, DEVIATIONS * length * math.sqrt(count))


class Growth:
    """Bounds how many waiting requests are let in.

    Args:
        experience: what is known of the device.
        answers: how long answers are.
        max_wait_s: a prompt that has waited so long is let in whatever it costs.
        least_slo_s: how long a step may take at the most for those who come before the answers end, seconds.
    """

    def __init__(
        self, experience: Experience, answers: Answers, max_wait_s: float, least_slo_s: float = math.inf
    ) -> None:
        self._experience = experience
        self.answers = answers
        self._max_wait_s = max_wait_s
        self._least_slo_s = least_slo_s

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if not view.decodes or (candidate.late and not self._crowded(view, candidate)):
            return candidate.tokens, candidate.reason
        inside = {request.request_id for request in view.prefills}
        limit_s = min(candidate.available_s, self._least_slo_s) / self._experience.model.decode_margin
        count = view.generating + len(view.prefills)
        context = view.decode_context_tokens + _tokens(view.prefills)
        tokens = 0
        for request in candidate.prompts:
            if request.request_id not in inside:
                count += 1
                context += request.whole_tokens
                overdue = candidate.is_overdue(request, self._max_wait_s)
                if not overdue and self.peak_s(count, context) > limit_s:
                    candidate.admitted_tokens = tokens
                    return tokens, Reason.GROWTH
            tokens += request.remaining_tokens
            if tokens >= candidate.tokens:
                break
        return candidate.tokens, candidate.reason

    def _crowded(self, view: StepView, candidate: Candidate) -> bool:
        """Whether decodes are late because they are many: half of them would be in time."""
        half, context = view.decodes // 2, view.decode_context_tokens // 2
        return (
            half > 0
            and self._experience.model.seconds(half, half, context, 0.0, half) <= candidate.available_s
        )

    def peak_s(self, count: int, context: int) -> float:
        """Return the seconds of the costliest step of decodes alone that is to be expected.

        As long as the lengths of answers are not known, it is the next one.
        """
        answers, seconds = self.answers, self._experience.model.seconds
        if not answers.known:
            return seconds(count, count, context, 0.0, count)
        mean, chance = answers.mean_tokens, answers.chance_tokens(count)
        peak_s = 0.0
        for moment in MOMENTS:
            left = math.exp(-moment)
            decodes = max(1, math.ceil(count * left))
            read = int((context + count * moment * mean) * left + chance)
            peak_s = max(peak_s, seconds(decodes, decodes, read, 0.0, decodes))
        return peak_s


def _tokens(requests: Sequence[RequestView]) -> int:
    return sum(request.whole_tokens for request in requests)
