"""What a policy sees of a step, what it answers, and what came of it. Plain values, no vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request that still has prompt tokens to read.

    Attributes:
        request_id: the engine's name for it.
        rank: its place in the queue's own order (arrival, or priority then arrival); smaller goes first.
        age_s: seconds since it arrived.
        done_tokens: prompt tokens already in the KV cache.
        remaining_tokens: prompt tokens still to read; output tokens too, after a preemption.
        ttft_slo_s: its own promised time to first token, seconds; None where it has none of its own.
    """

    request_id: str
    rank: tuple[float, float]
    age_s: float
    done_tokens: int
    remaining_tokens: int
    ttft_slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class DecodeView:
    """One request that generates tokens; seen only where a policy needs each of them.

    Attributes:
        request_id: the engine's name for it.
        output_tokens: tokens that it has generated, those of the steps in flight included.
        tbt_slo_s: its own promised time between tokens, seconds; None where it has none of its own.
    """

    request_id: str
    output_tokens: int
    tbt_slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class InFlight:
    """A batch that has been handed out and is not back yet: inside a pipeline, or with asynchronous scheduling.

    Attributes:
        started_s: when it was handed out, on the clock of StepView.now_s.
        stage_s: how long it is expected to take in each stage, seconds; 0 where nobody knows.
    """

    started_s: float
    stage_s: float


@dataclass(frozen=True, slots=True)
class StepView:
    """The state before a step.

    Attributes:
        now_s: the time, in seconds on a monotonic clock.
        decodes: running requests that have read their whole prompt.
        decode_tokens: tokens that those need in this step, speculative tokens included.
        decode_context_tokens: tokens in the KV cache of those, summed.
        prefills: running requests with a partly read prompt, in the engine's order.
        waiting: requests that wait to be let in, in the engine's order; as many as the policy asks for.
        max_tokens: the most tokens that the engine takes in one step.
        unseen_waiting: requests that wait beyond those in `waiting`.
        decode_views: the decodes one by one, where the policy asks for them; else empty.
        decodes_elsewhere: requests that generate and cannot be in this step, as their last token is still on its way
            through a pipeline; what follows it there waits for this step all the same.
        in_flight: the batches that are not back yet, oldest first.
    """

    now_s: float
    decodes: int
    decode_tokens: int
    decode_context_tokens: int
    prefills: tuple[RequestView, ...]
    waiting: tuple[RequestView, ...]
    max_tokens: int
    unseen_waiting: int = 0
    decode_views: tuple[DecodeView, ...] = ()
    decodes_elsewhere: int = 0
    in_flight: tuple[InFlight, ...] = ()

    @property
    def generating(self) -> int:
        """Requests whose next token waits for this step, whether or not they are in it."""
        return self.decodes + self.decodes_elsewhere


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A policy's answer for one step.

    Attributes:
        token_budget: the most tokens to schedule, decodes included; 1 to StepView.max_tokens.
        prefill_order: indices into StepView.prefills, first served first; each exactly once, but those held.
        held: indices into StepView.prefills that yield this step to a more urgent request.
        waiting_order: indices into StepView.waiting, first let in first; None leaves the queue as it is.
        decodes: whether decodes are served; else they stall for this step.
        admit: whether waiting requests are let in.
        reason: what set the budget, one word, for traces.
    """

    token_budget: int
    prefill_order: tuple[int, ...]
    held: tuple[int, ...] = ()
    waiting_order: tuple[int, ...] | None = None
    decodes: bool = True
    admit: bool = True
    reason: str = "fixed"


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        tokens: tokens through the linear layers.
        decodes: requests that decode.
        decode_context_tokens: KV tokens that those read, summed.
        prefill_work: attention of the prefill chunks: sum of chunk x (prefix + chunk / 2), in token pairs.
        sequences: requests in the step.
    """

    tokens: int
    decodes: int
    decode_context_tokens: int
    prefill_work: float
    sequences: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What came of a step.

    Attributes:
        shape: what it computed.
        token_budget: the budget that it had.
        reason: what set the budget.
        predicted_s: how long it was expected to take, seconds; None where nobody foretold it.
        measured_s: seconds between the completion before it and its own, or since its start after an idle time.
        completed_s: when it completed, seconds on the clock of StepView.now_s.
        started_s: when it was handed out, on the same clock; None where nobody noted it.
    """

    shape: StepShape
    token_budget: int
    reason: str
    predicted_s: float | None
    measured_s: float
    completed_s: float
    started_s: float | None = None


def chunk_work(done_tokens: int, chunk_tokens: float) -> float:
    """Return the attention work of a prefill chunk over its own prefix, in token pairs."""
    return chunk_tokens * (done_tokens + 0.5 * chunk_tokens)
