"""What a prompt that came now could expect: the time to its first token, and whether an SLO would be kept.

    wait = when_first_token(those ahead of it, at the prefill speed beside the present decodes)

`first_token.when_first_token` is the one place that computes it. The gate asks it for each request that arrives; this
module asks it for a request that has not been sent yet. It is cheap enough for a router to ask every replica.
"""

import math
from dataclasses import dataclass

from vllm_sarathi.core.first_token import Job, QueueView, when_first_token
from vllm_sarathi.core.headroom import prefill_tokens_per_s
from vllm_sarathi.core.limits.floor import PREFILL_SHARE
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import chunk_work


@dataclass(frozen=True, slots=True)
class FirstTokenForecast:
    """What a prompt can expect.

    Attributes:
        wait_s: seconds until its first token; None where nothing is known of the device yet.
        ahead_tokens: prompt tokens that are prefilled before it.
        kept: whether it would come within the SLO; None without an SLO or a forecast.
    """

    wait_s: float | None
    ahead_tokens: int
    kept: bool | None


def prefill_token_s(
    model: StepTimeModel,
    *,
    to_prefill: int,
    decodes: int,
    context_tokens: int,
    step_slo_s: float | None,
    most_tokens: int,
) -> float | None:
    """Return the seconds of prefill per prompt token beside the decodes; None where the device is not known yet.

    Args:
        model: the step-time model.
        to_prefill: prompt tokens that are to be prefilled.
        decodes, context_tokens: as in StepShape, of the requests that generate now.
        step_slo_s: how long a step may take for them, seconds; None where there is no SLO.
        most_tokens: the most tokens in a step.
    """
    if not model.ready:
        return None
    if decodes and step_slo_s is not None:
        speed = prefill_tokens_per_s(model, decodes, context_tokens, step_slo_s, most_tokens)
        # Where no chunk fits, prompts are prefilled all the same, in a part of the time.
        speed = speed or PREFILL_SHARE * _alone_tokens_per_s(model, to_prefill, most_tokens)
    else:
        speed = _alone_tokens_per_s(model, to_prefill, most_tokens)
    return 1 / speed if speed > 0 else None


def forecast_in_line(
    queue: QueueView, tokens: int, ttft_slo_s: float | None, last: bool = False
) -> FirstTokenForecast:
    """Return what a prompt that came now can expect where prompts are prefilled by deadline.

    Args:
        queue: what is to be prefilled, and how fast.
        tokens: the prompt's length, at least 1.
        ttft_slo_s: its time to first token, seconds, by which it has its place, too; None for none.
        last: whether it goes behind those without an SLO that is being met.
    """
    due_s = math.inf if ttft_slo_s is None else ttft_slo_s
    wait_s = when_first_token(queue, tokens, due_s, batch=last)
    before_s = wait_s - queue.lead_s - queue.prefill_s(tokens)
    ahead = round(before_s / queue.token_s) if queue.token_s > 0 else 0
    return FirstTokenForecast(wait_s, max(0, ahead), None if ttft_slo_s is None else wait_s <= ttft_slo_s)


def forecast_first_token(
    model: StepTimeModel,
    *,
    tokens: int,
    ahead_tokens: int,
    decodes: int,
    context_tokens: int,
    step_slo_s: float | None,
    most_tokens: int,
    ttft_slo_s: float | None,
) -> FirstTokenForecast:
    """Return what a prompt that came now can expect where `ahead_tokens` are prefilled before it, whatever its SLO.

    Args:
        model, decodes, context_tokens, step_slo_s, most_tokens: as in `prefill_token_s`.
        tokens: the prompt's length, at least 1.
        ahead_tokens: prompt tokens whose turn comes before.
        ttft_slo_s: the SLO to judge by, seconds; None for none.
    """
    token_s = prefill_token_s(
        model,
        to_prefill=ahead_tokens + tokens,
        decodes=decodes,
        context_tokens=context_tokens,
        step_slo_s=step_slo_s,
        most_tokens=most_tokens,
    )
    if token_s is None:
        return FirstTokenForecast(None, ahead_tokens, None)
    ahead = Job(-math.inf, ahead_tokens * token_s, stays=True)
    said = forecast_in_line(QueueView((ahead,), token_s), tokens, None)
    assert said.wait_s is not None
    return FirstTokenForecast(
        said.wait_s, ahead_tokens, None if ttft_slo_s is None else said.wait_s <= ttft_slo_s
    )


def _alone_tokens_per_s(model: StepTimeModel, to_prefill: int, most_tokens: int) -> float:
    """Return how fast prompts are prefilled where nothing decodes."""
    chunk = max(1, min(to_prefill, most_tokens))
    step_s = model.seconds(chunk, 0, 0, chunk_work(0, chunk), 1)
    return chunk / step_s if step_s > 0 else 0.0
