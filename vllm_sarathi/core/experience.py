"""What the steps so far have shown of the device, beside the step-time model itself."""

import math
from collections import deque

from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, Reason, StepRecord, StepView

PREFILL_ALONE_KEPT = 16
"""The latest steps without decodes, from which the first chunks beside decodes know what they can be."""

LATE_CREDIT_PER_STEP = 1 / 150
MOST_LATE_CREDIT = 4.0
"""Of the 1% of the steps that may be late two thirds may be so for a prompt's sake, and this number may be saved up:
in a minute of steps of 50 ms that is 1% in all."""

MOST_PAUSE = 15
MOST_ATTEMPT_TOKENS, LEAST_ATTEMPT_TOKENS = 16, 4
"""Steps that are late on purpose between two attempts, at the most, and the size of an attempt: see `Attempts`."""


class Attempts:
    """Steps that are in time by the prediction and not by its margin: whether to try another.

    After one that was late some steps that are late on purpose come first, twice as many after the next, and the next
    one is of half the size.

    Attributes:
        tokens: the prefill of the next one, at the most.
    """

    def __init__(self) -> None:
        self.tokens = MOST_ATTEMPT_TOKENS
        self._allowed_s = math.inf
        self._pause = self._last_pause = 0

    @property
    def allowed(self) -> bool:
        """Whether to try one, rather than a step that is late on purpose."""
        return self._pause == 0

    def tries(self, allowed_s: float) -> None:
        """Note that a step is tried that may take `allowed_s` seconds."""
        self._allowed_s = allowed_s

    def came_to(self, measured_s: float) -> bool:
        """Take in what an attempt took, seconds; return whether it was late."""
        late = measured_s > self._allowed_s
        self._last_pause = min(MOST_PAUSE, 2 * self._last_pause + 1) if late else 0
        tokens = self.tokens // 2 if late else 2 * self.tokens
        self.tokens = min(MOST_ATTEMPT_TOKENS, max(LEAST_ATTEMPT_TOKENS, tokens))
        self._pause = self._last_pause
        return late

    def gave_way(self) -> None:
        """Note a step that is late on purpose."""
        self._pause = max(0, self._pause - 1)


class Experience:
    """Answers what the limits ask of the device.

    Args:
        model: the step-time model; whoever holds this object lets it learn.
        pipeline: the stages of the device.
    """

    def __init__(self, model: StepTimeModel, pipeline: Pipeline) -> None:
        self.model = model
        self.pipeline = pipeline
        self.decode_step_s: float | None = None
        self.most_tokens = 0
        self.most_idle_tokens = 0
        self.last_prefill_tokens = 0
        self.hybrid_steps = 0
        self.steps_without_prefill = 0
        self.steps_since_decodes_alone = 0
        self.late_credit = MOST_LATE_CREDIT
        self.attempts = Attempts()
        self._prefill_alone: deque[tuple[int, float]] = deque(maxlen=PREFILL_ALONE_KEPT)

    def take_over(self, previous: "Experience") -> None:
        """Become, in place, what another has seen of the same device: the limits hold this object."""
        assert previous.model is self.model
        vars(self).update(vars(previous))

    def seconds(self, view: StepView, tokens: int, work: float, prompts: int, encoder: int = 0) -> float:
        """Return the predicted seconds of a step of the view's decodes and some prefill.

        Args:
            view: the step.
            tokens, work, prompts: the prefill, as in StepShape.
            encoder: embeddings that an encoder computes.
        """
        return self.model.seconds(
            view.decode_tokens + tokens,
            view.decodes,
            view.decode_context_tokens,
            work,
            view.decodes + prompts,
            encoder,
        )

    def decodes_alone_s(self, view: StepView) -> float:
        """Return the predicted seconds of the view's decodes alone; 0 without any."""
        return self.seconds(view, 0, 0.0, 0) if view.decodes else 0.0

    def tokens_as_alone(self, spare_s: float) -> int:
        """Return the prefill tokens that steps without decodes speak for, with `spare_s` beside decodes.

        Beside decodes, half of what was prefilled alone adds less than the time that took, and more than half of it
        where the first tokens cost the most (in a mixture of experts they wake most experts). So a share of the time
        is good for that share squared of the tokens.
        """
        return int(max((n * min(1.0, spare_s / taken) ** 2 for n, taken in self._prefill_alone), default=0.0))

    def note_decode_step(self, decode_s: float) -> None:
        """Take in what decodes alone are predicted to take: more at once, less slowly."""
        if decode_s > 0:
            known = self.decode_step_s
            self.decode_step_s = decode_s if known is None else max(decode_s, 0.98 * known + 0.02 * decode_s)

    def planned(self, prefill_tokens: int) -> None:
        """Note what a step is going to prefill, where something could be."""
        self.last_prefill_tokens = prefill_tokens
        self.steps_without_prefill = 0 if prefill_tokens else self.steps_without_prefill + 1

    def observe(self, record: StepRecord, stage_s: float) -> None:
        """Take in a finished step that took `stage_s` seconds in each stage."""
        shape = record.shape
        if shape.decodes:  # a long prompt alone says little of a small step beside decodes
            self.most_tokens = max(self.most_tokens, shape.tokens)
            self.late_credit = min(MOST_LATE_CREDIT, self.late_credit + LATE_CREDIT_PER_STEP)
            if record.reason is Reason.DOUBT:
                self.late_credit -= self.attempts.came_to(stage_s)
        else:
            self.most_idle_tokens = max(self.most_idle_tokens, shape.tokens)
            if 0 < stage_s < math.inf:
                self._prefill_alone.append((shape.tokens, stage_s))
        self.hybrid_steps += 0 < shape.decodes < shape.sequences
        alone = shape.sequences == shape.decodes
        self.steps_since_decodes_alone = 0 if alone else self.steps_since_decodes_alone + 1
