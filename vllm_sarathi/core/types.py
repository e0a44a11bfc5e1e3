"""What a policy sees of a step, what it answers, and what came of it. Plain values, no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_sarathi.core.chunk_rules import ANYWHERE, ChunkRules
from vllm_sarathi.core.classes import SloClass


class Reason(StrEnum):
    """What set the token budget of a step; the word stands in the step trace."""

    NONE = "none"
    """Nothing to prefill."""
    IDLE = "idle"
    """Nothing decodes, so nothing waits for the step's end."""
    ALL = "all"
    """Every prompt fitted."""
    ENGINE = "limit"
    """The engine takes no more tokens in one step."""
    SLO = "slo"
    """The predicted time of the step, times the margin, reaches the earliest deadline."""
    COLD = "cold"
    """Nothing is known of the device yet."""
    TRUST = "trust"
    """No further than the step-time model has seen."""
    EVEN = "even"
    """A batch's part of what a pipeline is to prefill."""
    ANSWER = "answer"
    """The prompts that are complete by now would wait too long for more."""
    BACKFILL = "backfill"
    """What is next is batch work, and letting it in would take what SLOs may need."""
    TURNOVER = "turnover"
    """Others wait for slots or KV blocks, and streams that move on free them sooner."""
    GROWTH = "growth"
    """One more request would make decodes alone outgrow the SLO before the answers end."""
    UNCUT = "uncut"
    """The chunk ends before something that must not be cut: an image, a state block of a hybrid model."""
    FULL = "full"
    """No room beside the decodes."""
    FLOOR = "floor"
    """No room beside the decodes, but prompts must not starve."""
    DOUBT = "doubt"
    """No room by the margin, and some by the prediction: an attempt that tells which of the two is right."""
    PROBE = "probe"
    """A look at what decodes alone take."""
    FIXED = "fixed"
    """A fixed token budget."""
    DECODES = "decodes"
    """`prefill-first`, `request-level`, `chunked-only`: a step of decodes alone."""
    PROMPTS = "prompts"
    """`prefill-first`: whole prompts, while the decodes wait."""
    WHOLE = "whole"
    """`orca`: all decodes, and the whole prompts that fit beside them."""
    BATCH = "batch"
    """`request-level`: the prompts of a new batch, as nothing decodes."""
    HIGH = "high"
    """`pressure`: something decodes and two prompts or more compete, so prefill gets 2,048 tokens."""
    LOW = "low"
    """`pressure`: nothing decodes, or one prompt at the most is there; the engine's limit."""
    CHUNK = "chunk"
    """`chunked-only`: a step of prefill alone, up to the token budget."""
    HYBRID = "hybrid"
    """`hybrid-only`: decodes and prompts, up to the engine's limit."""
    PROFILE = "profile"
    """`vllm-sarathi profile` chose the tokens of the step."""
    FAULT = "fault"
    """An error of the plugin; vLLM's scheduler planned the step."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How many stages a token passes: the number of steps that end between two tokens of a request.

    Attributes:
        stages: the depth of the pipeline; 1 without one.
    """

    stages: int = 1

    def __post_init__(self) -> None:
        assert self.stages >= 1

    def __bool__(self) -> bool:
        """True where there is one."""
        return self.stages > 1

    def step_s(self, token_s: float) -> float:
        """Return how long a step may take where a token may take `token_s` seconds."""
        return token_s / self.stages

    def token_s(self, step_s: float) -> float:
        """Return the time between two tokens of a request, seconds, where each step takes `step_s`."""
        return step_s * self.stages


ONE_STAGE = Pipeline()
"""A device without a pipeline."""

UNSEEN = "unseen"
"""The name of a prompt that stands for those out of sight."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request with tokens left to prefill.

    Attributes:
        request_id: the engine's name for it.
        rank: its place in the engine's own order (arrival, or priority then arrival); smaller goes first.
        age_s: seconds since it arrived.
        done_tokens: its leading tokens in the KV cache, those that a shared prefix has left there included.
        remaining_tokens: tokens left to prefill; output tokens too, after a preemption. Where the engine begins a
            single token together with places for its drafts, those too.
        ttft_slo_s: its own time-to-first-token SLO, seconds; None where it has none of its own.
        cached_tokens: those of the done tokens that it did not prefill itself, as another request had.
        rules: where its chunks may end.
        encoder_inputs: images or sound that the encoder has not computed yet, as (start in the prompt, embeddings).
        slo_class, tenant, tag: as in `classes.Bond`.
        answering: whether it has had its first token: it was preempted in the middle of an answer.
        later_tokens: tokens left beyond `remaining_tokens`, where those are what one step takes of it at the most; see
            `limits.base.within_step`.
        reader: while it waits, the index in StepView.prefills of a prompt that is about to read tokens which both
            share; None without one.
    """

    request_id: str
    rank: tuple[float, float]
    age_s: float
    done_tokens: int
    remaining_tokens: int
    ttft_slo_s: float | None = None
    cached_tokens: int = 0
    rules: ChunkRules = ANYWHERE
    encoder_inputs: tuple[tuple[int, int], ...] = ()
    slo_class: SloClass | None = None
    tenant: str = ""
    tag: float = 0.0
    answering: bool = False
    reader: int | None = None
    later_tokens: int = 0

    @property
    def whole_tokens(self) -> int:
        """Its tokens when it is prefilled."""
        return self.done_tokens + self.remaining_tokens + self.later_tokens

    @property
    def batch(self) -> bool:
        """Whether it takes only what SLOs leave."""
        return self.slo_class is not None and self.slo_class.batch


@dataclass(frozen=True, slots=True)
class DecodeView:
    """One request that generates tokens; seen only where a policy needs each of them.

    Attributes:
        request_id: the engine's name for it.
        output_tokens: tokens that it has generated, those of the steps in flight included.
        tbt_slo_s: its own time-between-tokens SLO, seconds; None where it has none of its own; infinite where it is
            of none.
    """

    request_id: str
    output_tokens: int
    tbt_slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class InFlight:
    """A batch that has been handed out and is not back yet: inside a pipeline, or with asynchronous scheduling.

    Attributes:
        started_s: when it was handed out, on the clock of StepView.now_s.
        stage_s: how long it is expected to take in each stage, seconds; 0 where that is not known.
    """

    started_s: float
    stage_s: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Who occupies the engine, and how much is left; seen only where there are classes, and something to prefill.

    Attributes:
        batch: requests of batch work that run.
        batch_kv_tokens: tokens of it in the KV cache.
        free_kv_tokens: tokens that the KV cache has room for.
        tenants: how many requests of each tenant run.
    """

    batch: int
    batch_kv_tokens: int
    free_kv_tokens: int
    tenants: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepView:
    """The state before a step.

    Attributes:
        now_s: the time, in seconds on a monotonic clock.
        decodes: running requests whose whole prompt is in the KV cache.
        decode_tokens: tokens that those need in this step, speculative tokens included.
        decode_context_tokens: tokens in the KV cache of those, summed.
        prefills: running requests with a partly prefilled prompt, in the engine's order.
        waiting: requests that wait to be let in and could be scheduled in this step, in the engine's order; as many
            as the order asks for.
        max_tokens: the most tokens that the engine takes in one step.
        unseen_waiting: requests that wait beyond those in `waiting`.
        decode_views: the decodes one by one, where the policy asks for them; else empty.
        decodes_elsewhere: requests that generate and cannot be in this step, as their last token is still on its way
            through a pipeline; what follows it there waits for this step all the same.
        in_flight: the batches that are not back yet, oldest first.
        free_slots: how many waiting requests the engine has slots for.
        closed: whether requests that arrive now are kept out.
        tbt_slos_s: the different SLOs that the generating requests have, as `DecodeView.tbt_slo_s`; empty where all
            have the server's.
        occupancy: who occupies the engine, where there are classes and the step could prefill something.
        blocked: how many requests wait for slots or KV blocks that only others free.
        most_of_one: the most tokens that the engine gives one request in a step where others are there.
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
    free_slots: int = 1 << 30
    closed: bool = False
    tbt_slos_s: tuple[float | None, ...] = ()
    occupancy: Occupancy | None = None
    blocked: int = 0
    most_of_one: int = 1 << 30

    @property
    def generating(self) -> int:
        """Requests whose next token waits for this step, whether or not they are in it."""
        return self.decodes + self.decodes_elsewhere


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The answer for one step.

    Attributes:
        token_budget: the most tokens to schedule, decodes included; 1 to StepView.max_tokens.
        prefill_order: indices into StepView.prefills, first served first; each exactly once, but those held.
        held: indices into StepView.prefills that yield this step to a more urgent request.
        waiting_order: indices into StepView.waiting, first let in first; None leaves the queue as it is.
        let_in: the most waiting requests to let in; None for as many as fit.
        decodes: whether decodes are served; else they stall for this step.
        reason: what set the budget, for traces.
    """

    token_budget: int
    prefill_order: tuple[int, ...]
    held: tuple[int, ...] = ()
    waiting_order: tuple[int, ...] | None = None
    let_in: int | None = None
    decodes: bool = True
    reason: Reason = Reason.FIXED


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        tokens: tokens through the linear layers.
        decodes: requests that decode.
        decode_context_tokens: KV tokens that those read, summed.
        prefill_work: attention of the prefill chunks: sum of chunk x (prefix + chunk / 2), in token pairs.
        sequences: requests in the step.
        encoder_tokens: embeddings that an encoder computes for images or sound.
    """

    tokens: int
    decodes: int
    decode_context_tokens: int
    prefill_work: float
    sequences: int
    encoder_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What came of a step.

    Attributes:
        shape: what it computed.
        token_budget: the budget that it had.
        reason: what set the budget.
        predicted_s: how long it was expected to take, seconds; None without a prediction.
        measured_s: seconds between the completion before it and its own, or since its start after an idle time.
        completed_s: when it completed, seconds on the clock of StepView.now_s.
        started_s: when it was handed out, on the same clock; None where that was not noted.
    """

    shape: StepShape
    token_budget: int
    reason: Reason
    predicted_s: float | None
    measured_s: float
    completed_s: float
    started_s: float | None = None


def chunk_work(done_tokens: int, chunk_tokens: float) -> float:
    """Return the attention work of a prefill chunk over its own prefix, in token pairs."""
    return chunk_tokens * (done_tokens + 0.5 * chunk_tokens)
