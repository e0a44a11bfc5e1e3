"""The batches of a pipeline get even parts of what is to be prefilled.

A batch comes back when the longest one beside it does (Sarathi-Serve, arXiv 2403.02310, section 3.3: pipeline bubbles),
so what fits beside the one before it costs nothing, and the parts of a prompt go through the stages side by side. A
prefill that takes a stage T in all, split into m parts, each with d for the decodes, has left p stages after
(m + p - 1) (T / m + d). What this saves is saved by the n prompts that are there; the d of each part delays all that
come while there is a queue, too (see `Backlog`). With P of those, the total delay is least at
m = sqrt((p - 1) T n / (d P)).
"""

import math

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.backlog import Backlog
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.types import Reason, StepView, chunk_work

LEAST_PART_TOKENS = 256
"""Smaller parts would not be quicker: reading the weights takes longer."""


class EvenParts:
    """Bounds a batch of a pipeline to an even part of what is to be prefilled."""

    def __init__(self, experience: Experience, backlog: Backlog) -> None:
        self._experience = experience
        self._backlog = backlog

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        experience, prompts = self._experience, candidate.prompts
        stages = experience.pipeline.stages
        if stages == 1:
            return candidate.tokens, candidate.reason
        left = sum(request.remaining_tokens + request.later_tokens for request in prompts)
        fixed_s = candidate.decode_s if view.decodes else experience.decode_step_s
        parts = float(stages)
        if fixed_s:
            work = sum(chunk_work(request.done_tokens, request.remaining_tokens) for request in prompts)
            prefill_s = experience.seconds(view, left, work, len(prompts)) - fixed_s
            delayed = self._backlog.delayed(len(prompts)) / max(1, len(prompts))
            parts = max(parts, math.sqrt((stages - 1) * max(0.0, prefill_s) / (delayed * fixed_s)))
        part = max(math.ceil(left / parts), experience.last_prefill_tokens, LEAST_PART_TOKENS)
        part += (
            -(view.decode_tokens + part) % experience.model.tile_tokens
        )  # the rest of a tile costs nothing
        if part < candidate.tokens:
            return part, Reason.EVEN
        return candidate.tokens, candidate.reason
