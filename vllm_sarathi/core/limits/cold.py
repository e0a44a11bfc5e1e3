"""Before anything is known of the device: a small chunk, or what was prefilled alone speaks for."""

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.types import Reason, StepView

COLD_TOKENS = 16
"""The first chunk beside decodes; also the least that guarantees progress."""

DECODES_SHARE = 0.5
"""How long decodes take is not known yet: so much of the SLO is theirs."""


class Cold:
    """Bounds the chunks beside decodes until the step-time model is ready."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if self._experience.model.ready:
            return candidate.tokens, candidate.reason
        tokens = max(COLD_TOKENS, self._experience.tokens_as_alone(DECODES_SHARE * candidate.available_s))
        return min(candidate.tokens, tokens), Reason.COLD
