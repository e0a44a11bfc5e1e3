"""The step-time model is trusted near what it has seen."""

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.limits.cold import COLD_TOKENS
from vllm_sarathi.core.types import Reason, StepView

GROWTH = 2.0
KNOWN_GROWTH = 3.0
KNOWN_STEPS = 32
"""A step may be GROWTH times the largest one seen of its kind, with decodes or without; KNOWN_GROWTH times it once
KNOWN_STEPS hybrid steps have been seen."""


class Trust:
    """Bounds a step by the largest one seen so far."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        seen = self._experience
        if view.decodes:
            growth = GROWTH if seen.hybrid_steps < KNOWN_STEPS else KNOWN_GROWTH
            trusted = int(growth * seen.most_tokens) - view.decode_tokens
            trusted = max(trusted, seen.tokens_as_alone(candidate.available_s - candidate.decode_s))
        else:
            trusted = int(GROWTH * seen.most_idle_tokens)
        trusted = max(COLD_TOKENS, trusted)
        if trusted < candidate.tokens:
            return trusted, Reason.TRUST
        return candidate.tokens, candidate.reason
