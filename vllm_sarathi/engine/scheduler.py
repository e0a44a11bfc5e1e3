"""SarathiScheduler: vLLM's own scheduler, told at each step how much to take and whom to serve first.

The parent's `schedule` is never copied. Before each step we look at its queues, ask the controller for a
plan, set what the plan says (the token budget, the order of `running` and of the queue), call the parent, and
restore.
"""

import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from vllm_sarathi.core.config import config_from_additional
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.figures import DEFAULT_CLASS, Queues
from vllm_sarathi.core.types import (
    InFlight,
    Pipeline,
    Reason,
    StepPlan,
    StepView,
)
from vllm_sarathi.engine.admission import Admissions
from vllm_sarathi.engine.composition import composed, scheduler_base
from vllm_sarathi.engine.control import Control
from vllm_sarathi.engine.faults import Faults
from vllm_sarathi.engine.steps import Interrupted, Step, StockStep, complete_step, record_of, stock_step
from vllm_sarathi.engine.telemetry import open_telemetry
from vllm_sarathi.engine.views import ViewBuilder
from vllm_sarathi.engine.vllm import runnable
from vllm_sarathi.engine.vllm.chunking import Chunking
from vllm_sarathi.engine.vllm.contract import missing_attributes, raise_violations, scheduler_classes
from vllm_sarathi.engine.vllm.internals import logger
from vllm_sarathi.engine.vllm.limits import (
    adapters_contend,
    adapters_of,
    restore_limits,
    save_limits,
    set_limits,
)
from vllm_sarathi.engine.vllm.preemption import preempt
from vllm_sarathi.engine.vllm.protocols import Request, SchedulerOutput, VllmConfig
from vllm_sarathi.engine.vllm.queues import reorder_waiting
from vllm_sarathi.engine.vllm.support import check_engine
from vllm_sarathi.engine.vllm.utility import offer_control

Scheduler, AsyncScheduler = scheduler_classes()

EMPTY_STEPS_BEFORE_FULL_BUDGET = 3
"""After this many steps that took nothing, the engine's own limit applies for one step: see `_is_stuck`."""


_Parent: Any = object
"""What comes after the mixin is decided by who uses it."""


class SarathiMixin(_Parent):  # type: ignore[misc]
    """Stall-free, hybrid batches within a time-between-tokens SLO (Sarathi-Serve, arXiv 2403.02310).

    Put it before any subclass of vLLM's scheduler: `class Mine(SarathiMixin, Theirs)`; see SLOs by class,
    *Beside another scheduler*.

    Args:
        vllm_config: vLLM's configuration; our settings are in its `additional_config`.
        args: handed to the parent, as they are.
        kwargs: likewise.

    Raises:
        ConfigError: a setting that this engine cannot keep.
        ContractError: this vLLM lacks something that the plugin needs.
    """

    max_num_scheduled_tokens: int
    num_spec_tokens: int
    running: list[Request]

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        raise_violations(missing_attributes("scheduler", self))
        config = config_from_additional(vllm_config.additional_config)
        # vLLM may switch chunking off after the model has loaded (non-causal layers): then stay out of its way.
        self.chunks = bool(self.scheduler_config.enable_chunked_prefill)
        if self.chunks:
            check_engine(vllm_config, config)
        else:
            logger.warning("vLLM has switched chunked prefill off; its stock scheduling applies.")
        self.config = config
        pipeline = Pipeline(vllm_config.parallel_config.pipeline_parallel_size)
        self.controller = StepController(config, pipeline)
        self.faults = Faults()
        self.telemetry = open_telemetry(
            vllm_config,
            config,
            self.controller,
            log=self.log_stats,
            faults=lambda: self.faults.total,
            queues=self.queues,
            most_tokens=self.max_num_scheduled_tokens,
        )
        self.clock: Callable[[], float] = time.monotonic
        self.wall_clock: Callable[[], float] = time.time
        stepwise = bool(pipeline) and not vllm_config.scheduler_config.async_scheduling
        self._chunking = Chunking(self)
        self.views = ViewBuilder(self, config, self.controller, self._chunking, stepwise)
        gate = self.controller.gate
        self.admissions: Admissions | None = None
        if gate is not None:
            self.admissions = Admissions(self, gate, self.views.bond, self.views.cached_tokens)
        self.interrupted = Interrupted()
        self._left_out: list[Request] = []
        self._in_flight: deque[Step | StockStep | None] = deque()
        self._completed_s: float | None = None
        self._empty_steps = 0
        self._step = 0
        self._last_served: dict[str, int] = {}
        self.control = Control(self)
        offer_control()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule one step by the controller's plan; arguments and result are the parent's."""
        if not self.chunks:
            return super().schedule(*args, **kwargs)
        if self.admissions is not None:
            self.guarded(self.admissions.judge, self.wall_clock())
        started_s, limits, running = self.clock(), save_limits(self), self.running
        # An exception of ours would end the engine for every client; a stock step costs one SLO.
        reason = Reason.ENGINE if self._is_stuck() or self.guarded(adapters_contend, self) else Reason.FAULT
        step = self.guarded(self._apply_plan, started_s) if reason is Reason.FAULT else None
        if step is None:  # the plan failed half-way, perhaps: nothing of it stays
            restore_limits(self, limits)
            self.running = running
        admitted: list[Request] = []
        self._left_out = [] if step is None else [*step.hidden, *step.stalled]
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self._left_out = []
            restore_limits(self, limits)
            if step is not None:
                admitted = self.running[step.visible :]
                if step.stalled or step.hidden:
                    self.running = step.stalled + self.running + step.hidden
        if step is not None:
            self.guarded(self._note_scheduled, step, output, admitted)
        self._note(step, output)
        if output.total_num_scheduled_tokens:
            if step is None or step.shape is None:
                step = self.guarded(stock_step, self, output, started_s, reason)
            self._in_flight.append(step)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Take in a finished step; arguments and result are the parent's."""
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            self.guarded(self._observe, self._in_flight.popleft())
        result = super().update_from_output(scheduler_output, model_runner_output)
        if self.admissions is not None:
            self.guarded(self.admissions.answer, result)
        if not self.running and not self._in_flight:
            self._completed_s = None  # idle: the next step's time counts from its own start
        return result

    def add_request(self, request: Request) -> None:
        """Queue a request; one whose id is already in use is refused in the log, as an error here ends the engine."""
        existing = self.requests.get(request.request_id)
        if existing is not None and existing.streaming_queue is None:
            logger.error(
                "Request id %r is already in use; the second request is dropped.", request.request_id
            )
            return
        self.guarded(self.views.added, request)
        super().add_request(request)
        if self.admissions is not None:
            self.guarded(self.admissions.added, request)

    def shutdown(self) -> None:
        """End, as the parent does, with the last figures told."""
        if self.telemetry is not None:
            self.guarded(self.telemetry.close)
        super().shutdown()

    def queues(self) -> Queues:
        """Return the requests that run and wait now; safe to call from any thread."""
        running, waiting = self.get_request_counts()
        if self.config.slo_classes is None:
            return Queues(running, {DEFAULT_CLASS: waiting})
        inside = {request.request_id for request in list(self.running)}
        outside = [r for r in list(self.requests.values()) if r.request_id not in inside]
        return Queues(running, Counter(self.views.slo_class(request) for request in outside))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Free a request that has ended; arguments and result are the parent's."""
        self.guarded(self.views.ended, request)
        self.interrupted.ended(request.request_id)
        if self.admissions is not None:
            self.guarded(self.admissions.ended, request)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Preempt a request, and note since when its client waits; arguments and result are the parent's."""
        if self.telemetry is not None:
            self.guarded(self._note_interruption, request)
        return super()._preempt_request(request, *args, **kwargs)

    def _note_interruption(self, request: Request) -> None:
        bond, last = self.views.bond(request), self._in_flight[-1] if self._in_flight else None
        self.interrupted.preempted(request, self.views.slo_class(request), bond, self._completed_s, last)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Size a chunk with images in it, as the parent does, and cut none that must stay whole.

        The parent leaves one whole only where the budget holds the largest image; ours may be smaller.
        """
        uncut = self.guarded(self._uncut, request, num_computed_tokens, num_new_tokens)
        num_new_tokens = num_new_tokens if uncut is None else uncut
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )

    def _uncut(self, request: Request, done_tokens: int, chunk: int) -> int:
        """Return how much of a chunk cuts nothing that must stay whole."""
        rules = self._chunking.rules(request, done_tokens)
        if not self.chunks or not rules.whole:
            return chunk
        return rules.fit(done_tokens, max(request.num_tokens, done_tokens + chunk), chunk)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Tell whether a waiting request may go on, as the parent does, and its adapter fits beside all that run.

        The parent counts the adapters of those that the step serves; those that it leaves out are in the next one, and
        it asserts there that all adapters fit. (vLLM 0.30 asks nothing here: see `adapters_contend`.)
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        return self.guarded(self._has_adapter_slot, request) is not False

    def _has_adapter_slot(self, request: Request) -> bool:
        if not self.lora_config or not request.lora_request:
            return True
        taken = adapters_of((*self.running, *self._left_out))
        return request.lora_request.lora_int_id in taken or len(taken) < self.lora_config.max_loras

    def guarded(self, ours: Callable[..., Any], *args: Any) -> Any:
        """Call code of ours; what it raises is logged and counted, and None is returned."""
        try:
            return ours(*args)
        except Exception as error:
            self.faults.note(error)
            return None

    def _apply_plan(self, started_s: float) -> Step:
        """Ask for a plan and set it on the parent."""
        sight = self.views.look(started_s, self.wall_clock(), self._inside())
        if sight.yielding:
            preempt(self, sight.yielding)
            sight = self.views.look(started_s, self.wall_clock(), self._inside(), yields=False)
        view, partial, waiting = sight.view, sight.partial, sight.waiting
        plan = self.controller.plan(view)
        operator.index(plan.token_budget)  # here, as vLLM's own code ends the engine over a fraction
        ordered = [partial[i] for i in plan.prefill_order]
        hidden = [partial[i] for i in plan.held]
        if plan.let_in != 0 and (plan.waiting_order is not None or sight.pressing):
            order = range(len(waiting)) if plan.waiting_order is None else plan.waiting_order
            waiting = [waiting[i] for i in order]
            reorder_waiting(self, [*waiting, *sight.pressing])
        let_in = plan.let_in
        if hidden and not self._may_yield(view, plan, waiting):
            ordered, hidden, let_in = ordered + hidden, [], None if let_in else let_in
        decodes = [r for r in self.running if not r.is_prefill_chunk] if partial else list(self.running)
        stalled: list[Request] = []
        take_turns = view.decode_tokens > plan.token_budget
        if not plan.decodes and self._can_stall(ordered, waiting):
            stalled, decodes = decodes, []
        else:
            decodes = self.views.company.batch_last(decodes)
        if take_turns and decodes:
            decodes.sort(key=lambda request: self._last_served.get(request.request_id, -1))
        # The parent walks the list from its head and, when KV blocks run out, preempts from its tail: so decodes get
        # their tokens first, and a prefill is preempted before a decode is.
        running = decodes + ordered
        if hidden or stalled or take_turns or running != self.running:
            self.running = running
        first = waiting[0] if waiting and let_in != 0 and not ordered else None
        budget = plan.token_budget
        if self.views.transfers:
            # vLLM asks a connector only where a request could begin; one whose KV is loaded takes no token yet.
            budget = min(max(budget, view.decode_tokens + 1 + self.num_spec_tokens), view.max_tokens)
            let_in = 1 if let_in == 0 else let_in
        set_limits(self, budget, len(hidden) + len(stalled), let_in)
        return Step(
            started_s,
            view,
            plan,
            partial,
            hidden,
            stalled,
            visible=len(self.running),
            decodes_take_turns=take_turns and not stalled,
            first=first if hidden or stalled else None,
        )

    def _may_yield(self, view: StepView, plan: StepPlan, waiting: list[Request]) -> bool:
        """True where prompts in flight may be hidden: nothing has to be preempted, and somebody can use the turn."""
        if plan.token_budget <= view.decode_tokens or plan.prefill_order:  # those that are not hidden use it
            return runnable.can_hide(self, view.decodes, None)
        return bool(waiting) and runnable.can_hide(self, view.decodes, waiting[0])

    def _can_stall(self, partial: list[Request], waiting: list[Request]) -> bool:
        """True where prompts can be prefilled while the decodes stand: else nothing would move."""
        if partial:
            return runnable.can_hide(self, 0, partial[0])
        return bool(waiting) and runnable.has_slot(self) and runnable.can_hide(self, 0, waiting[0])

    def _inside(self) -> Iterator[InFlight]:
        return (InFlight(s.started_s, s.predicted_s or 0.0) for s in self._in_flight if isinstance(s, Step))

    def _is_stuck(self) -> bool:
        """True where a small budget alone keeps everything from moving.

        Some parts of a prompt cannot be cut (an image, a state-space block): vLLM then takes nothing in a step
        whose budget is below their size, and would take nothing forever.
        """
        return self._empty_steps >= EMPTY_STEPS_BEFORE_FULL_BUDGET

    def _note_scheduled(self, step: Step, output: SchedulerOutput, admitted: list[Request]) -> None:
        """Note what a step by our plan turned out to be."""
        complete_step(self, step, output, admitted)
        self.views.note_room(output.num_scheduled_tokens)
        if step.first is not None:
            self.views.note_turn(step.first, step.first.request_id in output.num_scheduled_tokens)

    def _note(self, step: Step | None, output: SchedulerOutput) -> None:
        """Keep the books that the next steps need."""
        self._step += 1
        if step is not None and step.decodes_take_turns:
            self._last_served.update(dict.fromkeys(output.num_scheduled_tokens, self._step))
        elif self._last_served:
            self._last_served.clear()
        if output.total_num_scheduled_tokens:
            self._empty_steps = 0
        elif not self._in_flight and self.guarded(runnable.has_runnable_prefill, self):
            self._empty_steps += 1

    def _observe(self, step: Step | StockStep | None) -> None:
        """Measure a finished step as a client feels it: from the last completion, if work went on since."""
        now_s = self.clock()
        before_s, self._completed_s = self._completed_s, now_s
        if step is None:
            return
        step.completed_s = now_s
        if step.shape is None:
            return
        record = record_of(step, step.shape, now_s, before_s)
        if self.telemetry is not None:  # first: what cannot be learnt from counts all the same
            running, waiting = len(self.running), self.get_request_counts()[1]
            told = step.brought.told(now_s, self.wall_clock(), self.controller.tbt_slo_s)
            self.guarded(self.telemetry.note, record, running, waiting, *told)
        self.controller.observe(record)


class SarathiScheduler(SarathiMixin, Scheduler):  # type: ignore[misc, valid-type]  # the parent is resolved at run time
    """The mixin over vLLM's own scheduler, or over the one that the settings name.

    Name this one class in `scheduler_cls`; where vLLM resolves asynchronous scheduling to on, the object
    made is of a subclass for that.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is SarathiScheduler:
            asynchronous = vllm_config.scheduler_config.async_scheduling
            path = config_from_additional(vllm_config.additional_config).scheduler_base
            if path is not None:
                cls = composed(cls, scheduler_base(path, Scheduler), AsyncScheduler if asynchronous else None)
            elif asynchronous:
                cls = AsyncSarathiScheduler
        return super().__new__(cls)


class AsyncSarathiScheduler(SarathiScheduler, AsyncScheduler):  # type: ignore[misc, valid-type]
    """SarathiScheduler with the books of vLLM's asynchronous scheduler."""
