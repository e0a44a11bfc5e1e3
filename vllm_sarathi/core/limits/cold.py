"""Before anything is known of the device: a small chunk, or what steps that only prefilled have shown to be safe."""

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.types import Reason, StepView

COLD_TOKENS = 16
"""The first chunk beside decodes; also the least that guarantees progress."""

IDLE_TOKENS = 256
"""The first chunk where nothing decodes, and a step may still not take for ever."""

DECODES_SHARE = 0.5
"""The share of the SLO that is left to decodes while it is unknown how long they take."""


class Cold:
    """Bounds the chunks beside decodes until the step-time model is ready."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if self._experience.model.ready:
            return candidate.tokens, candidate.reason
        least = COLD_TOKENS if view.generating else IDLE_TOKENS
        tokens = max(least, self._experience.tokens_as_alone(DECODES_SHARE * candidate.available_s))
        return min(candidate.tokens, tokens), Reason.COLD
