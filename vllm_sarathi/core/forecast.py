"""How long a prompt that came now would wait for its first token, and whether a promise of it can be kept.

    wait = (tokens ahead of it + its own) / what is read in a second beside the present decodes

Cheap enough for a router to ask each replica before it sends a prompt to one of them.
"""

from dataclasses import dataclass

from vllm_sarathi.core.headroom import read_tokens_per_s
from vllm_sarathi.core.limits.floor import PREFILL_SHARE
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import chunk_work


@dataclass(frozen=True, slots=True)
class FirstTokenForecast:
    """What a prompt can expect.

    Attributes:
        wait_s: seconds until its first token; None where nothing is known of the device yet.
        ahead_tokens: prompt tokens that are read before it.
        kept: whether it would come within the promise; None without a promise or a forecast.
    """

    wait_s: float | None
    ahead_tokens: int
    kept: bool | None


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
    """Return what a prompt that came now can expect.

    Args:
        model: the step-time model.
        tokens: the prompt's length, at least 1.
        ahead_tokens: prompt tokens whose turn comes before.
        decodes, context_tokens: as in StepShape, of the requests that generate now.
        step_slo_s: how long a step may take for them, seconds; None where nothing is promised.
        most_tokens: the most tokens in a step.
        ttft_slo_s: the promise to judge by, seconds; None for none.
    """
    to_read = ahead_tokens + tokens
    if not model.ready:
        return FirstTokenForecast(None, ahead_tokens, None)
    if decodes and step_slo_s is not None:
        speed = read_tokens_per_s(model, decodes, context_tokens, step_slo_s, most_tokens)
        # Where no chunk fits, prompts are read all the same, in a part of the time.
        speed = speed or PREFILL_SHARE * _alone_tokens_per_s(model, to_read, most_tokens)
    else:
        speed = _alone_tokens_per_s(model, to_read, most_tokens)
    if speed <= 0:
        return FirstTokenForecast(None, ahead_tokens, None)
    wait_s = to_read / speed
    return FirstTokenForecast(wait_s, ahead_tokens, None if ttft_slo_s is None else wait_s <= ttft_slo_s)


def _alone_tokens_per_s(model: StepTimeModel, to_read: int, most_tokens: int) -> float:
    """Return how fast prompts are read where nothing decodes."""
    chunk = max(1, min(to_read, most_tokens))
    step_s = model.seconds(chunk, 0, 0, chunk_work(0, chunk), 1)
    return chunk / step_s if step_s > 0 else 0.0
