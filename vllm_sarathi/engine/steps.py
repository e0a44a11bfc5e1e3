"""A step between `schedule` and `update_from_output`, and what the figures are told of it."""

from dataclasses import dataclass, field
from typing import Any

from vllm_sarathi.core.figures import ClassGaps, FirstToken
from vllm_sarathi.core.types import Reason, StepPlan, StepShape, StepView, chunk_work
from vllm_sarathi.engine.vllm.images import encoder_tokens
from vllm_sarathi.engine.vllm.protocols import Request, SchedulerOutput


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
        first_tokens: class, arrival and SLO of those whose first token comes with it, in seconds.
        gaps: those that it ends, where there are classes.
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
    first_tokens: list[tuple[str, float, float]] = field(default_factory=list)
    gaps: tuple[ClassGaps, ...] = ()

    def first_tokens_at(self, wall_s: float) -> tuple[FirstToken, ...]:
        """Return the first tokens that it has brought by now, seconds since the epoch."""
        return tuple(
            FirstToken(name, max(0.0, wall_s - at_s), slo_s) for name, at_s, slo_s in self.first_tokens
        )


@dataclass(slots=True)
class StockStep:
    """The same for a step that stock scheduling served: after an error of ours, or where a small budget was stuck."""

    started_s: float
    plan: StepPlan
    shape: StepShape
    predicted_s: float | None = None
    gaps: tuple[ClassGaps, ...] = ()

    def first_tokens_at(self, wall_s: float) -> tuple[FirstToken, ...]:
        """Return none: nobody has looked at whose they are."""
        return ()


def stock_step(scheduler: Any, output: SchedulerOutput, started_s: float, reason: Reason) -> StockStep:
    """Work out what a step of stock scheduling computes: its gaps count, and it can be learnt from."""
    decoding: list[str] = []
    context, work = 0, 0.0
    for name, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[name]
        done = request.num_computed_tokens - tokens
        if done >= request.num_prompt_tokens:
            decoding.append(name)
            context += done
        else:
            work += chunk_work(done, tokens)
    shape = StepShape(
        tokens=output.total_num_scheduled_tokens,
        decodes=len(decoding),
        decode_context_tokens=context,
        prefill_work=work,
        sequences=len(output.num_scheduled_tokens),
        encoder_tokens=encoder_tokens(scheduler, output),
    )
    step = StockStep(started_s, StepPlan(scheduler.max_num_scheduled_tokens, (), reason=reason), shape)
    if scheduler.config.slo_classes is not None:
        controller = scheduler.controller
        step.gaps = scheduler.views.company.gaps_of(decoding, controller.tbt_slo_s, controller.pipeline)
    return step
