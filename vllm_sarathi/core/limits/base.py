"""The step that is being sized, and what a limit on it is."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

from vllm_sarathi.core.types import UNSEEN, Reason, RequestView, StepView, chunk_work


@dataclass(slots=True)
class Candidate:
    """A step that is being sized.

    Attributes:
        prompts: whose turn it is, in the order of their turns.
        tokens: prefill tokens, as far as the limits so far allow them.
        reason: which of those decided.
        available_s: how long the step may take.
        decode_s: how long its decodes alone are predicted to take; 0 without any, or where that is not known.
        late: whether decodes alone are predicted to miss the SLO.
        overdue, left_out: as in `Turn`.
        admitted_tokens: prefill tokens beyond which nobody more is let in, whatever gives way.
    """

    prompts: Sequence[RequestView]
    tokens: int
    reason: Reason
    available_s: float
    decode_s: float = 0.0
    late: bool = False
    overdue: Set[str] = frozenset()
    left_out: Set[str] = frozenset()
    admitted_tokens: float = math.inf

    def is_overdue(self, request: RequestView, max_wait_s: float) -> bool:
        """True for a prompt that has waited for its bound; batch work has one of its own."""
        if request.batch:
            return request.request_id in self.overdue
        return request.age_s >= max_wait_s


class Limit(Protocol):
    """One bound on the prefill of a step."""

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        """Return the prefill tokens that it allows, and the reason: the candidate's own where it changes nothing."""
        ...


def encoder_tokens(request: RequestView, chunk: int) -> int:
    """Return the embeddings that an encoder computes for the next `chunk` tokens of a prompt."""
    if not request.encoder_inputs:
        return 0
    end = request.done_tokens + chunk
    return sum(tokens for start, tokens in request.encoder_inputs if start < end)


@dataclass(frozen=True, slots=True)
class LastChunk:
    """The prompt in which a candidate ends.

    Attributes:
        request: the prompt.
        tokens: of it in the step.
        before: prefill tokens of the prompts before it.
        work: the attention work of those.
        encoder: embeddings that an encoder computes for those.
        prompts: how many prompts the step prefills, this one included.
    """

    request: RequestView
    tokens: int
    before: int
    work: float
    encoder: int
    prompts: int


def last_chunk(candidate: Candidate) -> LastChunk | None:
    """Return the prompt in which a candidate ends; None where it holds no prefill."""
    before, work, encoder = 0, 0.0, 0
    for prompts, request in enumerate(candidate.prompts, start=1):
        left = candidate.tokens - before
        if 0 < left <= request.remaining_tokens:
            return LastChunk(request, left, before, work, encoder, prompts)
        if left <= 0:
            return None
        before += request.remaining_tokens
        work += chunk_work(request.done_tokens, request.remaining_tokens)
        encoder += encoder_tokens(request, request.remaining_tokens)
    return None


def chunks_within(prompts: Sequence[RequestView], tokens: int) -> tuple[int, float, int, int]:
    """Return what of the prompts fits into `tokens`: tokens, attention work, how many prompts, and embeddings."""
    taken, work, count, encoder = 0, 0.0, 0, 0
    for request in prompts:
        chunk = min(request.remaining_tokens, tokens - taken)
        if chunk <= 0:
            break
        taken, count = taken + chunk, count + 1
        work += chunk_work(request.done_tokens, chunk)
        encoder += encoder_tokens(request, chunk)
    return taken, work, count, encoder


def within_step(view: StepView, prompts: Sequence[RequestView]) -> list[RequestView]:
    """Return prompts as far as the engine takes them in one step: the rest of a long one leaves room for the others.

    The last one may stand for those out of sight, of which nothing is known.
    """
    most = view.most_of_one
    return [
        request
        if request.remaining_tokens <= most or request.request_id == UNSEEN
        else replace(request, remaining_tokens=most, later_tokens=request.remaining_tokens - most)
        for request in prompts
    ]


def reached_within(prompts: Sequence[RequestView], tokens: int) -> int:
    """Return how many of the prompts have all of `tokens` that they take in a step."""
    for count, request in enumerate(prompts):
        tokens -= request.remaining_tokens
        if tokens < 0:
            return count
    return len(prompts)


def complete_within(prompts: Sequence[RequestView], tokens: int) -> int:
    """Return how many of the prompts are complete after `tokens`."""
    return sum([not request.later_tokens for request in prompts[: reached_within(prompts, tokens)]])


def prompts_left(view: StepView, prompts: Sequence[RequestView], complete: int) -> int:
    """Return how many prompts are there besides the first `complete` of those whose turn it is."""
    return len(prompts) - complete + max(0, view.unseen_waiting - 1)
