"""The SLO-driven policy: the largest prefill that still ends in time, computed before every step.

    1. Serve every decode.
    2. The step must end when the earliest of their next tokens is due (`deadlines`).
    3. Take the waiting prompts in the order that was chosen (`order`).
    4. In that order, take prompt tokens while predicted time x margin ends by then (`limits.fit`).
    5. Each further limit in the list may take less, or give the least that keeps prompts moving (`limits`).

The paper profiles one budget per deployment and leaves a dynamic one to future work (Sarathi-Serve, arXiv 2403.02310,
section 4.3).
"""

import math

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.deadlines import TokenDeadlines
from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.fixed_budget import FixedBudget
from vllm_sarathi.core.limits.backfill import Backfill
from vllm_sarathi.core.limits.backlog import Backlog
from vllm_sarathi.core.limits.base import (
    Candidate,
    Limit,
    complete_within,
    prompts_left,
    reached_within,
    within_step,
)
from vllm_sarathi.core.limits.cold import Cold
from vllm_sarathi.core.limits.even import EvenParts
from vllm_sarathi.core.limits.fit import Fit
from vllm_sarathi.core.limits.floor import Floor
from vllm_sarathi.core.limits.growth import Answers, Growth
from vllm_sarathi.core.limits.shape import Tail, Tile, Uncut, least_chunk
from vllm_sarathi.core.limits.stop_early import StopEarly
from vllm_sarathi.core.limits.trust import Trust
from vllm_sarathi.core.limits.turnover import Turnover
from vllm_sarathi.core.order.base import Turn
from vllm_sarathi.core.policy import Policy, decodes_only
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.steptime.stages import StageClock
from vllm_sarathi.core.types import (
    ONE_STAGE,
    UNSEEN,
    Pipeline,
    Reason,
    RequestView,
    StepPlan,
    StepRecord,
    StepView,
)

JOINING_SHARE = 0.8
"""`auto` is a multiple of a decode step of the batch at hand; where many join, of this share of what it will be."""

DECODES_ALONE_EVERY_STEPS = 64
"""The interval of steps without prefill, where it matters how long decodes alone take: nothing else shows it."""

CLASS_SLO_SHARE = 0.99
"""With classes, steps are planned with this share of the SLO: it holds for each request by itself, and four steps in
two seconds that are late by a hundredth break it for all that have short answers then."""


def make(config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> Policy:
    """Return the policy of `--scheduler sarathi`: by a token budget where one is given, else by the SLO."""
    if config.token_budget is not None:
        return FixedBudget(config, model, pipeline)
    return SloPolicy(config, model, pipeline)


class SloPolicy:
    """Plans each step by the time-between-tokens SLO.

    Args:
        config: the settings.
        model: the step-time model, which learns from the same steps.
        pipeline: the stages of the device.

    Attributes:
        late: whether decodes alone were predicted to miss the SLO, when a step was last sized.
        answers: the lengths of prompts and answers.
    """

    waiting_seen = 16
    learns = True

    def __init__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline = ONE_STAGE) -> None:
        self.config = config
        self.model = model
        self.pipeline = pipeline
        self.deadlines = TokenDeadlines(config.tbt_mode, pipeline)
        self.needs_decode_views = self.deadlines.needs_decode_views
        classes = config.slo_classes
        self.needs_tbt_slos = config.allow_request_slo or classes is not None
        self.late = False
        self.answers = Answers()
        self.longest_step_s = math.inf
        self.experience = experience = Experience(model, pipeline)
        self._auto_slo_s: float | None = None
        self._stated_slo_s = _stated_slo_s(config)
        self._slo_share = 1.0 if classes is None else CLASS_SLO_SHARE
        self._backlog = backlog = Backlog()
        self._stages = StageClock(pipeline.stages)
        stop_early = StopEarly(experience, backlog)
        least_slo_s = math.inf if classes is None else pipeline.step_s(classes.least("tbt_slo_s"))
        growth = Growth(experience, self.answers, config.prefill_max_wait_s, least_slo_s)
        backfill: tuple[Limit, ...] = ()
        if classes is not None:
            backfill = (Backfill(experience, growth, least_slo_s, classes.has_batch),)
        self.limits: tuple[Limit, ...] = (
            Trust(experience),
            EvenParts(experience, backlog),
            growth,
            *backfill,
            Fit(experience, stop_early),
            Turnover(experience),
            Tail(experience),
            Tile(experience),
            Uncut(),
            Floor(experience, config.prefill_max_wait_s),
        )
        self.cold_limits: tuple[Limit, ...] = (
            Cold(experience),
            *backfill,
            Uncut(),
            Floor(experience, config.prefill_max_wait_s),
        )
        self.idle_limits: tuple[Limit, ...] = (Fit(experience, stop_early), Uncut())

    @property
    def tbt_slo_s(self) -> float | None:
        """The time-between-tokens SLO, seconds; None while `auto` has no decode step to go by."""
        return self._auto_slo_s if self._stated_slo_s is None else self._stated_slo_s

    @property
    def decode_step_s(self) -> float:
        """How long decodes alone take, seconds; 0 where that is not known."""
        return self.experience.decode_step_s or 0.0

    def plan(self, view: StepView, turn: Turn) -> StepPlan:
        """Decide the next step."""
        if view.decodes and not (view.prefills or view.waiting or view.unseen_waiting):
            # The answer that all below comes to, without its cost: most steps of a server are such.
            self.experience.last_prefill_tokens = 0
            self._backlog.planned(0, 0)
            return decodes_only(view, Reason.NONE)
        prompts = within_step(view, turn.prompts(view))
        tokens, reason = self._size(view, prompts, turn)
        self.experience.planned(tokens)
        complete = complete_within(prompts, tokens)
        self._backlog.planned(complete, prompts_left(view, prompts, complete))
        if tokens == 0 and view.decodes:
            return decodes_only(view, reason)
        if reason is Reason.FLOOR and tokens < (least := least_chunk(prompts[0])) <= view.max_tokens:
            # What cannot be cut and has no room beside the decodes goes alone, or it would wait for them to end.
            return turn.plan(view, least, reason, decodes=False, let_in=1)
        return turn.plan(
            view, view.decode_tokens + tokens, reason, let_in=_let_in(view, turn, prompts, tokens)
        )

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        self.deadlines.completed(record.completed_s)
        measured_s = record.measured_s
        if self.pipeline and record.started_s is not None:
            measured_s = self._stages.seconds(record.started_s, record.completed_s)
        self.model.observe(record.shape, measured_s)
        self.experience.observe(record, measured_s)

    def arrived(self, request_id: str, most_answer_tokens: int) -> None:
        """Note a request, and how long its answer may become."""
        self.answers.arrived(request_id, most_answer_tokens)

    def ended(self, request_id: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Learn from a request that has ended."""
        self.answers.ended(request_id, prompt_tokens, answer_tokens)

    def take_over(self, previous: Policy) -> None:
        """Go on with what another policy of this kind has seen of the device and of the requests."""
        if isinstance(previous, SloPolicy):
            self.experience.take_over(previous.experience)
            self.answers.take_over(previous.answers)
            self.deadlines.completed(previous.deadlines.last_delivery_s(math.inf))
            self._stages = previous._stages

    def _size(self, view: StepView, prompts: list[RequestView], turn: Turn) -> tuple[int, Reason]:
        """Return how many prefill tokens the step takes, and what decided."""
        room = view.max_tokens - view.decode_tokens
        if not prompts or room <= 0:
            return 0, Reason.NONE
        candidate = Candidate(prompts, room, Reason.ENGINE, math.inf)
        candidate.overdue, candidate.left_out = turn.overdue, turn.left_out
        if not view.generating and self.longest_step_s == math.inf:
            return self._size_idle(view, candidate)
        if not self.model.ready:
            candidate.available_s = self.pipeline.step_s(self.tbt_slo_s or 0.0)
            return self._apply(self.cold_limits, view, candidate)
        candidate.decode_s = decode_s = self.experience.decodes_alone_s(view)
        self.experience.note_decode_step(decode_s)
        if view.generating:
            slo_s = self._slo_for(view, prompts)
            if slo_s is None:
                return self._apply(self.cold_limits, view, candidate)
            candidate.available_s = self._slo_share * self.deadlines.available_s(view, slo_s)
        self.late = candidate.late = decode_s > candidate.available_s
        if self.pipeline and view.in_flight and not candidate.late:
            candidate.available_s = min(candidate.available_s, self._in_line_s(view, candidate.available_s))
        candidate.available_s = min(candidate.available_s, self.longest_step_s)
        due = self.experience.steps_since_decodes_alone > DECODES_ALONE_EVERY_STEPS
        if due and view.decodes and (candidate.late or self._stated_slo_s is None):
            return 0, Reason.PROBE
        return self._apply(self.limits, view, candidate)

    def _size_idle(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        """Return the same for a step that nothing waits for but the prompts in it."""
        if not self.model.ready and len(candidate.prompts) > 1:
            # One prompt shows how fast others are prefilled; all of them at once, and a crowd's first tokens are late.
            return min(candidate.tokens, candidate.prompts[0].remaining_tokens), Reason.COLD
        tokens, reason = self._apply(self.idle_limits, view, candidate)
        if reason in (Reason.ANSWER, Reason.UNCUT) and tokens:
            return tokens, reason
        return view.max_tokens, Reason.IDLE

    @staticmethod
    def _apply(limits: tuple[Limit, ...], view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        for limit in limits:
            candidate.tokens, candidate.reason = limit(view, candidate)
        return candidate.tokens, candidate.reason

    def _slo_for(self, view: StepView, prompts: list[RequestView]) -> float | None:
        """Return the SLO; `auto` is a multiple of a decode step of the batch at hand, those being let in included."""
        if self._stated_slo_s is not None:
            return self._stated_slo_s
        joining = sum(request.request_id != UNSEEN for request in prompts)
        decodes = max(view.generating, int((view.generating + joining) * JOINING_SHARE))
        # Those that join are taken to have contexts like the others: one long prompt lengthens nobody's SLO.
        context = view.decode_context_tokens * decodes // max(1, view.decodes)
        decode_s = self.model.seconds(decodes, decodes, context, 0.0, decodes)
        if decode_s > 0:
            self._auto_slo_s = self.config.tbt_slo_factor * self.pipeline.token_s(decode_s)
        return self._auto_slo_s

    def _in_line_s(self, view: StepView, available_s: float) -> float:
        """Return how long a batch may take in a pipeline for it and those after it to be in time."""
        gap_s = self.pipeline.token_s(available_s)
        due_s = self.deadlines.last_delivery_s(view.now_s) + gap_s if view.decodes else math.inf
        return self._stages.longest_s(view.now_s, due_s, gap_s, view.in_flight)


def _stated_slo_s(config: SarathiConfig) -> float | None:
    """Return the time between tokens that is stated: the server's, else the tightest class's."""
    if config.tbt_slo_ms is not None:
        return config.tbt_slo_ms / 1e3
    least_s = math.inf if config.slo_classes is None else config.slo_classes.least("tbt_slo_s")
    return None if least_s == math.inf else least_s


def _let_in(view: StepView, turn: Turn, prompts: list[RequestView], tokens: int) -> int | None:
    """Return how many waiting requests the planned tokens reach; None where those out of sight are among them."""
    if tokens >= view.max_tokens - view.decode_tokens:
        return None
    reached = reached_within(prompts, tokens)
    if tokens > sum(request.remaining_tokens for request in prompts[:reached]):
        reached += 1
    waiting = reached - len(turn.prefills)
    return None if waiting > len(view.waiting) else max(0, waiting)
