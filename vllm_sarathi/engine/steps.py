"""A step between `schedule` and `update_from_output`, and what the figures are told of it."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.figures import ClassGaps, TokenWait
from vllm_sarathi.core.types import Reason, StepPlan, StepRecord, StepShape, StepView, chunk_work
from vllm_sarathi.engine.vllm.images import encoder_tokens
from vllm_sarathi.engine.vllm.protocols import Request, SchedulerOutput


@dataclass(slots=True)
class Brought:
    """What a step brings to clients.

    Attributes:
        gaps: the gaps of its own length that it ends, where there are classes.
        first_tokens: class, arrival and SLO of those whose first token comes with it, in seconds.
        resumed: the streams that go on with it after a preemption.
        batch_tokens: its prompt tokens of batch work.
    """

    gaps: Iterable[ClassGaps] = ()
    first_tokens: list[tuple[str, float, float]] = field(default_factory=list)
    resumed: list["Interruption"] = field(default_factory=list)
    batch_tokens: int = 0

    def told(
        self, now_s: float, wall_s: float, tbt_slo_s: float | None
    ) -> tuple[Iterable[ClassGaps], tuple[TokenWait, ...], tuple[TokenWait, ...], int]:
        """Return what the telemetry's `note` is told of a step that has ended.

        Args:
            now_s, wall_s: now, seconds on the scheduler's clock and since the epoch.
            tbt_slo_s: the server's own time between tokens, seconds; None for none.
        """
        first = [TokenWait(name, max(0.0, wall_s - at_s), slo_s) for name, at_s, slo_s in self.first_tokens]
        resumed = [wait for each in self.resumed if (wait := each.wait(now_s, tbt_slo_s)) is not None]
        return self.gaps, tuple(first), tuple(resumed), self.batch_tokens


@dataclass(slots=True)
class Step:
    """A step by our plan.

    Attributes:
        started_s: when it was handed out, on the clock of the view.
        view, plan: what the controller saw and answered.
        partial, hidden, stalled: half-read prompts, those of them that yield, and decodes that stand.
        visible: how many requests the parent sees as running.
        decodes_take_turns: whether the budget is short of a token for each decode.
        first: whose turn it is, where others yield to a waiting request.
        shape, predicted_s: what it computes, and how long that should take; None until it is scheduled.
        brought: what it brings to clients.
        completed_s: when it ended, on the clock of the view; None before.
    """

    started_s: float
    view: StepView
    plan: StepPlan
    partial: list[Request]
    hidden: list[Request]
    stalled: list[Request]
    visible: int
    decodes_take_turns: bool
    first: Request | None
    shape: StepShape | None = None
    predicted_s: float | None = None
    brought: Brought = field(default_factory=Brought)
    completed_s: float | None = None


@dataclass(slots=True)
class StockStep:
    """The same for a step that stock scheduling served: after an error of ours, or where a small budget was stuck."""

    started_s: float
    plan: StepPlan
    shape: StepShape
    predicted_s: float | None = None
    brought: Brought = field(default_factory=Brought)
    completed_s: float | None = None


def record_of(step: Step | StockStep, shape: StepShape, now_s: float, before_s: float | None) -> StepRecord:
    """Return what came of a step that ends now, as a client feels it: from the completion before, if work went on."""
    return StepRecord(
        shape=shape,
        token_budget=step.plan.token_budget,
        reason=step.plan.reason,
        predicted_s=step.predicted_s,
        measured_s=now_s - (step.started_s if before_s is None else before_s),
        completed_s=now_s,
        started_s=step.started_s,
    )


@dataclass(frozen=True, slots=True)
class Interruption:
    """A stream that had begun and was preempted: its client waits from the token before it to the one after.

    Attributes:
        slo_class: its request's class.
        bond: what its request is bound to.
        before_s: when the last step ended before it, seconds on the scheduler's clock; None where its first token was
            on its way then.
        on_its_way: the last step that was handed out before with a token of it, and was not back.
    """

    slo_class: str
    bond: Bond
    before_s: float | None
    on_its_way: Step | StockStep | None

    def wait(self, now_s: float, tbt_slo_s: float | None) -> TokenWait | None:
        """Return the wait that ends now; None where nobody knows when it began.

        Args:
            now_s: seconds on the scheduler's clock.
            tbt_slo_s: the server's own time between tokens, seconds; None for none.
        """
        since_s = self.before_s
        if self.on_its_way is not None and self.on_its_way.completed_s is not None:
            since_s = self.on_its_way.completed_s
        if since_s is None:
            return None
        slo_s = tbt_slo_s if self.bond.tbt_slo_s is None else self.bond.tbt_slo_s
        return TokenWait(
            self.slo_class, now_s - since_s, slo_s if slo_s is not None and math.isfinite(slo_s) else None
        )


class Interrupted:
    """The streams that stand still after a preemption.

    The steps in between end no gap of theirs, and the one that brings their next token reads a prompt to the engine:
    so each is kept here from the one to the other.
    """

    def __init__(self) -> None:
        self._streams: dict[str, Interruption] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def preempted(
        self,
        request: Request,
        slo_class: str,
        bond: Bond,
        before_s: float | None,
        last: Step | StockStep | None,
    ) -> None:
        """Note a request that is about to be preempted.

        Args:
            request: vLLM's.
            slo_class, bond: of the request.
            before_s: when the last step ended, seconds on the scheduler's clock; None where none has.
            last: the last step that was handed out and is not back; None where all are.
        """
        on_its_way = request.num_computed_tokens >= request.num_tokens
        begun = request.num_output_tokens > 0
        if request.request_id not in self._streams and (begun or on_its_way):
            self._streams[request.request_id] = Interruption(
                slo_class, bond, before_s if begun else None, last if on_its_way else None
            )

    def ended(self, request_id: str) -> None:
        """Forget a request."""
        self._streams.pop(request_id, None)

    def resumed(self, request_id: str) -> Interruption | None:
        """Return the interruption that the next token of a request ends, once; None where there is none."""
        return self._streams.pop(request_id, None)


def complete_step(scheduler: Any, step: Step, output: SchedulerOutput, admitted: list[Request]) -> None:
    """Work out what a step by our plan computes, how long it should take, and what it brings.

    Args:
        scheduler: ours.
        step: the step, which has been scheduled.
        output: what vLLM scheduled.
        admitted: the requests that it let in.
    """
    scheduled, work, prefills = output.num_scheduled_tokens, 0.0, 0
    for request in itertools.chain(step.partial, admitted):
        chunk = scheduled.get(request.request_id)
        if chunk:
            work += chunk_work(request.num_computed_tokens - chunk, chunk)
            prefills += 1
            _note_chunk(scheduler, step.brought, request, chunk)
    step.shape = StepShape(
        tokens=output.total_num_scheduled_tokens,
        decodes=len(scheduled) - prefills,
        decode_context_tokens=0 if step.stalled else step.view.decode_context_tokens,
        prefill_work=work,
        sequences=len(scheduled),
        encoder_tokens=encoder_tokens(scheduler, output),
    )
    controller, views = scheduler.controller, scheduler.views
    step.predicted_s = controller.predict(step.shape)
    if scheduler.telemetry is not None and scheduler.config.slo_classes is not None:
        step.brought.gaps = views.company.gaps(
            step.shape.decodes,
            lambda: scheduled.keys() - {request.request_id for request in (*step.partial, *admitted)},
            controller.tbt_slo_s,
            controller.pipeline,
        )
        for name in views.newly_relegated():
            scheduler.telemetry.count("relegated_requests", name)


def stock_step(scheduler: Any, output: SchedulerOutput, started_s: float, reason: Reason) -> StockStep:
    """Work out what a step of stock scheduling computes and brings: it counts, and can be learnt from."""
    brought = Brought()
    decoding: list[str] = []
    context, work = 0, 0.0
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        done = request.num_computed_tokens - tokens
        if done >= request.num_prompt_tokens and name not in scheduler.interrupted:
            decoding.append(name)
            context += done
        else:
            work += chunk_work(done, tokens)
            _note_chunk(scheduler, brought, request, tokens)
    shape = StepShape(
        tokens=output.total_num_scheduled_tokens,
        decodes=len(decoding),
        decode_context_tokens=context,
        prefill_work=work,
        sequences=len(output.num_scheduled_tokens),
        encoder_tokens=encoder_tokens(scheduler, output),
    )
    if scheduler.config.slo_classes is not None:
        controller = scheduler.controller
        brought.gaps = scheduler.views.company.gaps_of(decoding, controller.tbt_slo_s, controller.pipeline)
    plan = StepPlan(scheduler.max_num_scheduled_tokens, (), reason=reason)
    return StockStep(started_s, plan, shape, brought=brought)


def _note_chunk(scheduler: Any, brought: Brought, request: Request, tokens: int) -> None:
    """Note what reading a chunk of a prompt brings: nothing yet, a first token, or one after a preemption."""
    if scheduler.telemetry is None:
        return
    views = scheduler.views
    if views.bond(request).batch:
        brought.batch_tokens += tokens
    if request.is_prefill_chunk:
        return
    if (interruption := scheduler.interrupted.resumed(request.request_id)) is not None:
        brought.resumed.append(interruption)
    elif not request.num_output_tokens and (slo_s := views.ttft_slo_s(request)) is not None:
        brought.first_tokens.append((views.slo_class(request), request.arrival_time, slo_s))
