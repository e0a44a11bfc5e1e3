"""Whether to end a step with a finished prompt: does that save more waiting than it costs?

The prompts that are finished by now wait for all that is prefilled after them in the same step. The cost of one more
step delays the prompts that are left, and those that will come while there is a queue.
"""

from collections.abc import Sequence

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.backlog import Backlog
from vllm_sarathi.core.limits.base import prompts_left
from vllm_sarathi.core.types import RequestView, StepView

FIXED_SHARE = 0.5
"""The least cost of one more step, as a share of what a step of decodes usually takes."""


class StopEarly:
    """Decides at the end of each prompt in a step."""

    def __init__(self, experience: Experience, backlog: Backlog) -> None:
        self._experience = experience
        self._backlog = backlog

    def __call__(
        self,
        view: StepView,
        prompts: Sequence[RequestView],
        tokens: int,
        work: float,
        complete: int,
        encoder: int,
    ) -> bool:
        """Tell whether to end the step.

        Args:
            view: the step.
            prompts: whose turn it is.
            tokens, work: the prefill so far, as in StepShape.
            complete: how many of the prompts that completes.
            encoder: embeddings that an encoder computes for them.
        """
        experience = self._experience
        if experience.pipeline:  # the batches of a pipeline wait for the longest of them anyway
            return False
        left = prompts_left(view, prompts, complete)
        if left <= 0:
            return False
        step_s = experience.seconds(view, tokens, work, complete, encoder)
        fixed_s = max(experience.seconds(view, 0, 0.0, 0), FIXED_SHARE * (experience.decode_step_s or 0.0))
        return complete * (step_s - fixed_s) > self._backlog.delayed(left) * fixed_s
