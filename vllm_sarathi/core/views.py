"""What a policy sees of a step, and what it answers. Plain values, no vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request that still has prompt tokens to read.

    Attributes:
        request_id: the engine's name for it.
        rank: its place in the queue's own order (arrival, or priority then arrival); smaller goes first.
        done_tokens: prompt tokens already in the KV cache.
        remaining_tokens: prompt tokens still to read; output tokens too, after a preemption.
    """

    request_id: str
    rank: tuple[float, float]
    done_tokens: int
    remaining_tokens: int


@dataclass(frozen=True, slots=True)
class StepView:
    """The state before a step.

    Attributes:
        decodes: running requests that have read their whole prompt.
        decode_tokens: tokens that those need in this step, speculative tokens included.
        prefills: running requests with a partly read prompt, in the engine's order.
        max_tokens: the most tokens that the engine takes in one step.
    """

    decodes: int
    decode_tokens: int
    prefills: tuple[RequestView, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A policy's answer for one step.

    Attributes:
        token_budget: the most tokens to schedule, decodes included; 1 to StepView.max_tokens.
        prefill_order: indices into StepView.prefills, first served first; each exactly once.
        reason: what set the budget, one word, for traces.
    """

    token_budget: int
    prefill_order: tuple[int, ...]
    reason: str
