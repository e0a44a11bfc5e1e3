"""The largest prefill whose step is predicted to end in time."""

from bisect import bisect_right

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate, encoder_tokens
from vllm_sarathi.core.limits.stop_early import StopEarly
from vllm_sarathi.core.types import Reason, RequestView, StepView, chunk_work


class Fit:
    """Bounds a step by time: predicted seconds times the margin end by the deadline.

    Args:
        experience: what is known of the device.
        stop_early: whether to end a step at the end of a prompt.
    """

    def __init__(self, experience: Experience, stop_early: StopEarly) -> None:
        self._experience = experience
        self._stop_early = stop_early

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        model_seconds = self._experience.seconds
        limit_s = candidate.available_s / self._experience.model.margin
        most, prompts = candidate.tokens, candidate.prompts
        tokens, work, encoder, complete = 0, 0.0, 0, 0
        for count, request in enumerate(prompts, start=1):
            whole = min(request.remaining_tokens, most - tokens)
            if whole <= 0:
                return tokens, candidate.reason
            done = request.done_tokens
            images = encoder + encoder_tokens(request, whole)
            if model_seconds(view, tokens + whole, work + chunk_work(done, whole), count, images) > limit_s:
                return tokens + self._part(
                    view, tokens, work, count, encoder, request, whole, limit_s
                ), Reason.SLO
            tokens += whole
            work += chunk_work(done, whole)
            encoder = images
            ends = whole == request.remaining_tokens and not request.later_tokens
            complete += ends
            if ends and self._stop_early(view, prompts, tokens, work, complete, encoder):
                return tokens, Reason.ANSWER
        return tokens, Reason.ALL if tokens < most or candidate.reason is Reason.ENGINE else candidate.reason

    def _part(
        self,
        view: StepView,
        tokens: int,
        work: float,
        count: int,
        encoder: int,
        request: RequestView,
        whole: int,
        limit_s: float,
    ) -> int:
        """Return the largest part of a prompt that fits after `tokens` of others, by bisection."""
        seconds, done = self._experience.seconds, request.done_tokens

        def step_s(part: int) -> float:
            images = encoder + encoder_tokens(request, part)
            return seconds(view, tokens + part, work + chunk_work(done, part), count, images)

        return bisect_right(range(1, whole), limit_s, key=step_s)
