"""When the next token of a request is due, and so when a step must have ended.

An SLO for the time between tokens (TBT) has one of two meanings:

- *gap*: every gap keeps it. The next token is due at the last one's time + SLO. This is strict, and what the paper's
  P99 of TBT measures (Sarathi-Serve, section 5).
- *pace*: token n is due at the first token's time + n x SLO (as in QoServe, arXiv 2503.22562). A stream that is ahead
  of its pace has slack to lend. This is what a reader notices, who only has to wait if the stream falls behind.
"""

import math

from vllm_sarathi.core.types import ONE_STAGE, DecodeView, Pipeline, StepView


class TokenDeadlines:
    """Tracks tokens as they are delivered, and tells how long the step at hand may take.

    Args:
        mode: `gap` or `pace`.
        pipeline: the stages of the device.
    """

    def __init__(self, mode: str, pipeline: Pipeline = ONE_STAGE) -> None:
        assert mode in ("gap", "pace")
        self._pace = mode == "pace"
        self._pipeline = pipeline
        self._last_completion_s = float("-inf")
        self._first_token_s: dict[str, float] = {}

    @property
    def needs_decode_views(self) -> bool:
        """Whether the deadlines follow from each decode rather than from all at once."""
        return self._pace

    def completed(self, at_s: float) -> None:
        """Note that a step's tokens were delivered at `at_s`."""
        self._last_completion_s = max(self._last_completion_s, at_s)

    def last_delivery_s(self, now_s: float) -> float:
        """Return when tokens were last delivered; not later than now, whatever the clock did."""
        return min(self._last_completion_s, now_s)

    def available_s(self, view: StepView, tbt_slo_s: float) -> float:
        """Return the seconds from the last delivery, or from the end of a step still under way, to the step's own end.

        Args:
            view: the step; `decode_views` count for a pace, `tbt_slos_s` for gaps.
            tbt_slo_s: the SLO to requests without one of their own.
        """
        if self._pace:
            available_s = self._pace_s(view, tbt_slo_s)
        else:
            available_s = min(
                [tbt_slo_s if own is None else own for own in view.tbt_slos_s], default=tbt_slo_s
            )
        return self._pipeline.step_s(available_s)

    def _pace_s(self, view: StepView, tbt_slo_s: float) -> float:
        since_s = self.last_delivery_s(view.now_s)
        if not self._pipeline:  # a step that still runs ends first, and its tokens count as delivered
            since_s += sum(batch.stage_s for batch in view.in_flight)
        due_s = [self._due_s(decode, tbt_slo_s, since_s) for decode in view.decode_views]
        if len(self._first_token_s) > 2 * len(due_s) + 64:
            running = {decode.request_id for decode in view.decode_views}
            self._first_token_s = {k: v for k, v in self._first_token_s.items() if k in running}
        return min(due_s) - since_s if due_s else tbt_slo_s

    def _due_s(self, decode: DecodeView, tbt_slo_s: float, since_s: float) -> float:
        slo_s = tbt_slo_s if decode.tbt_slo_s is None else decode.tbt_slo_s
        if slo_s == math.inf:
            return slo_s
        # A decode that is new here got its first token with the last delivery.
        first_s = self._first_token_s.setdefault(
            decode.request_id, since_s - slo_s * max(0, decode.output_tokens - 1)
        )
        return first_s + slo_s * max(1, decode.output_tokens)
