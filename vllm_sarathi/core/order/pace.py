"""How fast prompts are prefilled: as those of a queue were, or, if none waits, as the step-time model says.

What was learnt of a queue holds for the decodes that ran beside it. When they have ended it says little: requests that
it refused would never be prefilled, and nothing new would be learnt.
"""

import math

from vllm_sarathi.core.forecast import prefill_token_s
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, Reason, StepRecord, StepView

NOBODY_WAITS = (Reason.ALL, Reason.IDLE, Reason.BACKFILL, Reason.PROBE)
"""What ends a step that nobody with an SLO waits for the end of."""

QUEUE_MEMORY_S = 5.0
"""The seconds of queueing that tell how fast prompts are prefilled in a queue; and how long that counts after it."""

MODEL_CAUTION = 1.15
"""What the model says of a pace that was not seen is taken to be slower: its steps are full, and nobody else comes."""

UNKNOWN_MOST_TOKENS = 2048
"""Before the first step is looked at."""


class ReadingPace:
    """Learns from finished steps how fast a queue is prefilled, and knows what to make of that now.

    Args:
        model: predicts steps.
        pipeline: the stages of the device.

    Attributes:
        least_tbt_slo_s: how long a step may take for decodes without an SLO of their own, seconds.
    """

    def __init__(self, model: StepTimeModel, pipeline: Pipeline) -> None:
        self.least_tbt_slo_s = math.inf
        self._model = model
        self._pipeline = pipeline
        self._queue_s = self._queue_tokens = self._queue_share = 0.0
        self._last: StepRecord | None = None
        self._tbt_slos_s: tuple[float | None, ...] = ()
        self._most_tokens = UNKNOWN_MOST_TOKENS
        self._known_of: tuple[object, ...] = ()
        self._model_s: float | None = None

    def look(self, view: StepView) -> None:
        """Note what the step at hand is bound to."""
        self._tbt_slos_s, self._most_tokens = view.tbt_slos_s, view.max_tokens

    def observe(self, record: StepRecord, no_room: bool) -> None:
        """Learn from a finished step. Those that have no room for a prompt count, too: a queue waits for them.

        Args:
            record: the step.
            no_room: whether prompts waited for a slot or for KV blocks when the step last ordered was planned.
        """
        if not 0 < record.measured_s < math.inf:
            return
        waiting = no_room if record.reason is Reason.NONE else record.reason not in NOBODY_WAITS
        before_s = record.completed_s if self._last is None else self._last.completed_s
        passed_s = max(record.measured_s, record.completed_s - before_s)
        kept = math.exp(-passed_s / QUEUE_MEMORY_S)
        self._queue_share = kept * self._queue_share + (1 - kept) * waiting
        self._last = record
        if not waiting:
            return
        kept = math.exp(-record.measured_s / QUEUE_MEMORY_S)
        work_s = min(0.8 * record.measured_s, self._model.work_s * record.shape.prefill_work)
        self._queue_s = kept * self._queue_s + record.measured_s - work_s
        self._queue_tokens = kept * self._queue_tokens + record.shape.tokens - record.shape.decodes

    def token_s(self, known_s: float) -> float:
        """Return the seconds of prefill per token.

        The longer nobody has waited, the more it is what the model says of the decodes that there are now, where that
        is less than what was learnt.

        Args:
            known_s: the same for steps that read prompts, before any has waited.
        """
        token_s = self._queue_s / self._queue_tokens if self._queue_tokens > 0 else known_s
        if self._last is None:
            return token_s
        model_s = self._beside_last(self._last)
        if model_s is None:
            return token_s
        now_s = min(token_s, MODEL_CAUTION * model_s)
        return self._queue_share * token_s + (1 - self._queue_share) * now_s

    def token_alone_s(self, tokens: int) -> float | None:
        """Return the seconds per token of a prompt of a length on a device that does nothing else; None if unknown."""
        return self._beside(0, 0, tokens)

    def _beside_last(self, last: StepRecord) -> float | None:
        """Return the seconds per token beside the decodes of the last step; worked out once a step, whoever asks."""
        known_of = (last, self.least_tbt_slo_s, self._tbt_slos_s, self._most_tokens)
        if known_of != self._known_of:
            shape = last.shape
            self._model_s = self._beside(shape.decodes, shape.decode_context_tokens, self._most_tokens)
            self._known_of = known_of
        return self._model_s

    def _beside(self, decodes: int, context_tokens: int, tokens: int) -> float | None:
        slo_s = min(
            [self.least_tbt_slo_s if s is None else self._pipeline.step_s(s) for s in self._tbt_slos_s],
            default=self.least_tbt_slo_s,
        )
        return prefill_token_s(
            self._model,
            to_prefill=tokens,
            decodes=decodes,
            context_tokens=context_tokens,
            step_slo_s=None if slo_s == math.inf else slo_s,
            most_tokens=self._most_tokens,
        )
