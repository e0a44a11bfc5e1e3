"""What a policy is, and what several of them share."""

import math
from collections.abc import Sequence
from typing import Protocol

from vllm_sarathi.core.chunk_rules import ANYWHERE
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.limits.shape import least_chunk
from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, Reason, RequestView, StepPlan, StepRecord, StepView


class Policy(Protocol):
    """Decides how much of a step is whose, with no state of the engine in it.

    Attributes:
        waiting_seen: how many waiting requests it wants to see in the queue's own order.
        needs_decode_views: whether it wants to see each decode.
        needs_tbt_slos: whether it wants to know which SLOs the decodes have.
        learns: whether it learns step times, so that they are worth keeping for the next start.
        longest_step_s: how long a step may take for the sake of those who arrive while it runs, seconds; set before
            each plan.
    """

    waiting_seen: int
    needs_decode_views: bool
    needs_tbt_slos: bool
    learns: bool
    longest_step_s: float

    @property
    def tbt_slo_s(self) -> float | None:
        """The time-between-tokens SLO, seconds; None where there is none, or none is known yet."""
        ...

    @property
    def decode_step_s(self) -> float:
        """How long decodes alone take, seconds; 0 where that is not known."""
        ...

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step, of which `turn` says whose it is."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        ...

    def arrived(self, request_id: str, most_answer_tokens: int) -> None:
        """Note a request, and how long its answer may become."""
        ...

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Learn from a request that has ended."""
        ...

    def take_over(self, previous: "Policy") -> None:
        """Go on where another policy of the same device leaves off."""
        ...


class PolicyMaker(Protocol):
    """Makes a policy."""

    def __call__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> Policy:
        """Return a policy.

        Args:
            config: the settings.
            model: the step-time model, which learns from the same steps.
            pipeline: the stages of the device.
        """
        ...


class Baseline:
    """What the schedulers to compare with have in common: they see some of the queue, and learn nothing.

    Args:
        config: the settings; a token budget is the most that a baseline takes in one step.
        model, pipeline: not used.
    """

    waiting_seen = 64
    needs_decode_views = False
    needs_tbt_slos = False
    learns = False
    longest_step_s = math.inf
    tbt_slo_s = None
    decode_step_s = 0.0

    def __init__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> None:
        self._most_tokens = config.token_budget

    def observe(self, record: StepRecord) -> None:
        """A baseline learns nothing."""

    def arrived(self, request_id: str, most_answer_tokens: int) -> None:
        """Nor from this."""

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Nor from this."""

    def take_over(self, previous: Policy) -> None:
        """It has nothing to take over."""

    def room(self, view: StepView, prompts: Sequence[RequestView], decode_tokens: int = 0) -> int:
        """Return the most tokens of a step, those of its decodes included.

        What cannot be cut of the first prompt is above any budget, or it would never be prefilled.

        Args:
            view: the step.
            prompts: whose turn it is, in order.
            decode_tokens: the tokens of the decodes that are served beside them.
        """
        room = min(view.max_tokens, self._most_tokens or view.max_tokens)
        if not prompts or prompts[0].rules is ANYWHERE:
            return room
        return min(view.max_tokens, max(room, decode_tokens + least_chunk(prompts[0])))


def whole_prompts(prompts: Sequence[RequestView], room: int) -> int:
    """Return the tokens of the first prompts that are prefilled whole within `room`; one too long for it is cut."""
    total = 0
    for request in prompts:
        if total + request.remaining_tokens > room:
            return total if total else max(0, room)
        total += request.remaining_tokens
    return total


def decodes_only(view: StepView, reason: Reason = Reason.DECODES) -> StepPlan:
    """Return the plan of a step without prefill.

    All prompts are held, not only left out of the budget: a decode that turns out to end would leave its token to one.
    """
    return StepPlan(
        token_budget=min(view.max_tokens, max(1, view.decode_tokens)),
        prefill_order=(),
        held=tuple(range(len(view.prefills))),
        let_in=0,
        reason=reason,
    )
