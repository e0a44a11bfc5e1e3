"""Headroom: the prompt tokens per second that could still be prefilled within the SLO.

It is what fits beside the decodes, less what is used. Batch work gives way to requests with an SLO, so it counts as
neither, and never calls for more replicas.

It is meant for autoscalers: at 0 the next prompt waits, or an SLO is missed.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vllm_sarathi.core.figures import FinishedStep
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import chunk_work


class Claim(NamedTuple):
    """What a step, or steps on average, computed for requests that do not give way.

    Attributes:
        decodes, context_tokens: as in StepShape.
        prefill_tokens: of their prompts.
    """

    decodes: int
    context_tokens: int
    prefill_tokens: int


def claim(step: FinishedStep, batch: Collection[str]) -> Claim:
    """Return what of a step was no batch work; its share of the decodes' context is taken to be that of the decodes.

    Args:
        step: the step.
        batch: the classes that are batch work.
    """
    shape = step.traced.shape
    decodes = shape.decodes - sum(gaps.decodes for gaps in step.gaps if gaps.slo_class in batch)
    context = shape.decode_context_tokens * decodes // shape.decodes if shape.decodes else 0
    read = shape.tokens - shape.decodes - step.batch_tokens if shape.prefill_work > 0 else 0
    return Claim(decodes, context, read)


def mean_claim(claims: Sequence[Claim]) -> Claim:
    """Return the decodes of those steps that had any, on average, and all that was prefilled."""
    decoding = [each for each in claims if each.decodes]
    return Claim(
        round(sum(each.decodes for each in decoding) / len(decoding)) if decoding else 0,
        sum(each.context_tokens for each in decoding) // len(decoding) if decoding else 0,
        sum(each.prefill_tokens for each in claims),
    )


def largest_chunk(
    model: StepTimeModel, decodes: int, context_tokens: int, step_slo_s: float, most_tokens: int
) -> int:
    """Return the largest chunk of a new prompt whose step beside the decodes ends in time, margin included.

    Args:
        model: the step-time model.
        decodes, context_tokens: as in StepShape; the decodes that the chunk is to go beside.
        step_slo_s: how long the step may take, seconds.
        most_tokens: the most tokens in a step.
    """
    limit_s, most = step_slo_s / model.margin, most_tokens - decodes
    # Often all of it fits: then one look is enough, instead of a dozen.
    if most > 0 and _step_s(model, decodes, context_tokens, most) <= limit_s:
        return most
    return bisect_right(
        range(1, most), limit_s, key=lambda chunk: _step_s(model, decodes, context_tokens, chunk)
    )


def _step_s(model: StepTimeModel, decodes: int, context_tokens: int, chunk: int) -> float:
    return model.seconds(decodes + chunk, decodes, context_tokens, chunk_work(0, chunk), decodes + 1)


def prefill_tokens_per_s(
    model: StepTimeModel, decodes: int, context_tokens: int, step_slo_s: float, most_tokens: int
) -> float:
    """Return the prompt tokens that can be prefilled in a second beside the decodes within the SLO.

    Args: as in `largest_chunk`.
    """
    chunk = largest_chunk(model, decodes, context_tokens, step_slo_s, most_tokens)
    step_s = _step_s(model, decodes, context_tokens, chunk)
    return chunk / step_s if chunk and step_s > 0 else 0.0


def headroom_tokens_per_s(
    model: StepTimeModel,
    decodes: int,
    context_tokens: int,
    step_slo_s: float,
    most_tokens: int,
    used_tokens_per_s: float,
) -> float:
    """Return the prompt tokens a second that could still be prefilled within the SLO; 0 where none can.

    Args:
        model, decodes, context_tokens, step_slo_s, most_tokens: as in `largest_chunk`.
        used_tokens_per_s: prompt tokens that are prefilled in a second now.
    """
    able = prefill_tokens_per_s(model, decodes, context_tokens, step_slo_s, most_tokens)
    return max(0.0, able - used_tokens_per_s)


def replicas_wanted(read: Sequence[float], headroom: Sequence[float], full: float) -> int | None:
    """Return how many replicas the load needs; None where no replica prefills or could, which says nothing.

    It is what all of them prefill, over what one of them could prefill on average when it counts as full.

    Args:
        read: prompt tokens that each replica prefills in a second.
        headroom: what each could prefill beyond that within the SLO; 0 where it is not known.
        full: the share of what a replica could prefill at which it counts as full, above 0 and at most 1.
    """
    assert 0 < full <= 1
    able = [used + spare for used, spare in zip(read, headroom, strict=True) if used + spare > 0]
    if not able:
        return None
    return max(1, math.ceil(sum(read) / (full * sum(able) / len(able))))
