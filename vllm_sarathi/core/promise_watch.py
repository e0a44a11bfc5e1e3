"""PromiseWatch: notices a promise that no chunk size could keep, and says once what would help."""

import math
import statistics
from collections.abc import Sequence

from vllm_sarathi.core.cost_model import CostModel
from vllm_sarathi.core.step_trace import TracedStep

LEAST_STEPS = 16
"""A judgement needs so many steps with decodes in them: one slow step is no proof."""


class PromiseWatch:
    """Compares the time that decodes alone take with what is promised.

    Args:
        model: tells the decodes' part of a step that also read prompts.
        steps_per_token: steps that end between two tokens of a request: the depth of a pipeline, else 1.

    Attributes:
        unkeepable: whether decodes alone took longer than promised, at the last look.
        decode_step_s: how long they took, seconds, the median; None before the first look.
    """

    def __init__(self, model: CostModel, steps_per_token: int = 1) -> None:
        self.unkeepable = False
        self.decode_step_s: float | None = None
        self._model = model
        self._steps_per_token = steps_per_token
        self._said = False

    def look(self, steps: Sequence[TracedStep]) -> str | None:
        """Judge the promise by the latest steps; return what to tell the operator, the first time that it is broken."""
        decoding = [step for step in steps if step.shape.decodes > 0 and step.slo_s is not None]
        if len(decoding) < LEAST_STEPS:
            return None
        self.decode_step_s = statistics.median(self._alone_s(step) for step in decoding)
        slo_s = decoding[-1].slo_s
        assert slo_s is not None
        self.unkeepable = self.decode_step_s > slo_s
        if not self.unkeepable or self._said:
            return None
        self._said = True
        return self._advice(decoding[-1], slo_s)

    def _alone_s(self, step: TracedStep) -> float:
        """Return how long the step's decodes take without the prompts beside them."""
        if step.shape.prefill_work == 0:
            return step.measured_s
        return self._seconds(step, step.shape.decodes)

    def _seconds(self, step: TracedStep, decodes: int) -> float:
        context = step.shape.decode_context_tokens * decodes // step.shape.decodes
        return self._model.seconds(decodes, decodes, context, 0.0, decodes)

    def _advice(self, step: TracedStep, slo_s: float) -> str:
        assert self.decode_step_s is not None
        margin = self._model.margin
        needed_ms = math.ceil(self.decode_step_s * self._steps_per_token * margin * 1e3)
        fitting = [n for n in range(1, step.shape.decodes) if self._seconds(step, n) * margin <= slo_s]
        fewer = f", or fewer requests at once (--max-num-seqs of about {fitting[-1]})" if fitting else ""
        promised_ms, taken_ms = (x * self._steps_per_token * 1e3 for x in (slo_s, self.decode_step_s))
        return (
            f"The promise of {promised_ms:g} ms between tokens cannot be kept: decodes alone take {taken_ms:.0f} ms "
            f"with {step.shape.decodes} of them running. Prompts are read in small pieces beside them. "
            f"What would help: --tbt-slo-ms {needed_ms} or more{fewer}."
        )
