"""SarathiScheduler: vLLM's own scheduler, told at each step how much to take and whom to serve first.

The parent's `schedule` is never copied. Before each step we look at its queues, ask the controller for a
plan, set what the plan says (the token budget, the order of `running` and of the queue), call the parent, and
restore.
"""

import itertools
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.config import config_from_additional
from vllm_sarathi.core.controller import Controller
from vllm_sarathi.core.views import (
    DecodeView,
    InFlight,
    RequestView,
    StepPlan,
    StepRecord,
    StepShape,
    StepView,
    chunk_work,
)
from vllm_sarathi.engine.promises import NONE, Promise, read_promise
from vllm_sarathi.engine.telemetry import open_telemetry
from vllm_sarathi.engine.vllm.contract import (
    missing_attributes,
    raise_violations,
    scheduler_classes,
)
from vllm_sarathi.engine.vllm.internals import is_priority_policy, logger
from vllm_sarathi.engine.vllm.limits import restore_limits, save_limits, set_limits
from vllm_sarathi.engine.vllm.queues import move_to_front, reorder_waiting, sort_newest
from vllm_sarathi.engine.vllm.runnable import can_hide, has_runnable_prefill, has_slot
from vllm_sarathi.engine.vllm.support import check_engine

Scheduler, AsyncScheduler = scheduler_classes()

EMPTY_STEPS_BEFORE_FULL_BUDGET = 3
"""After this many steps that took nothing, the engine's own limit applies for one step: see `_is_stuck`."""


LOOK_FAR_EVERY_STEPS = 64
"""An order that looks some way into the queue looks through all of it so often."""


@dataclass(slots=True)
class _Step:
    """A step between `schedule` and `update_from_output`."""

    started_s: float
    view: StepView
    plan: StepPlan
    partial: list[Any]
    hidden: list[Any]
    stalled: list[Any]
    visible: int
    decodes_take_turns: bool
    shape: StepShape | None = None
    predicted_s: float | None = None


class SarathiScheduler(Scheduler):  # type: ignore[misc, valid-type]  # the parent is resolved at run time
    """Stall-free, hybrid batches within a promised time between tokens (Sarathi-Serve, arXiv 2403.02310).

    Name this one class in `scheduler_cls`; where vLLM resolves asynchronous scheduling to on, the object
    made is of the subclass that keeps the asynchronous scheduler's books.

    Args:
        vllm_config: vLLM's configuration; our settings are in its `additional_config`.
        args, kwargs: handed to the parent as they are.

    Raises:
        ConfigError: a setting that this engine cannot keep.
        ContractError: a vLLM that lacks something we lean on.
    """

    max_num_scheduled_tokens: int
    running: list[Any]

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is SarathiScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = AsyncSarathiScheduler
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        raise_violations(missing_attributes("scheduler", self))
        config = config_from_additional(vllm_config.additional_config)
        # vLLM may switch chunking off after the model has loaded (non-causal layers): then stay out of its way.
        self._chunked = bool(self.scheduler_config.enable_chunked_prefill)
        if self._chunked:
            check_engine(vllm_config, config)
        else:
            logger.warning("vLLM has switched chunked prefill off; its stock scheduling applies.")
        self.config = config
        stages = vllm_config.parallel_config.pipeline_parallel_size
        self.controller = Controller(config, stages)
        self.telemetry = open_telemetry(vllm_config, config, self.controller, self.log_stats)
        self.clock: Callable[[], float] = time.monotonic
        self.wall_clock: Callable[[], float] = time.time
        self.plan_failures = 0
        self._pipelined = stages > 1 and not vllm_config.scheduler_config.async_scheduling
        self._by_deadline = config.prefill_order == "deadline"
        self._by_priority = is_priority_policy(self)
        self._promises: dict[str, Promise] = {}
        self._arrived: set[str] = set()
        self._in_flight: deque[_Step | None] = deque()
        self._completed_s: float | None = None
        self._empty_steps = 0
        self._step = 0
        self._last_served: dict[str, int] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule one step by the controller's plan; arguments and result are the parent's."""
        if not self._chunked:
            return super().schedule(*args, **kwargs)
        if self._arrived:
            self._guarded(self._take_in_arrived)
        limits = save_limits(self)
        # An exception of ours would end the engine for every client; a stock step costs one promise.
        step = None if self._is_stuck() else self._guarded(self._apply_plan)
        admitted: list[Any] = []
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            restore_limits(self, limits)
            if step is not None:
                admitted = self.running[step.visible :]
                if step.stalled or step.hidden:
                    self.running = step.stalled + self.running + step.hidden
        if step is not None:
            self._guarded(self._note_shape, step, output, admitted)
        self._note(step, output)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a finished step; arguments and result are the parent's."""
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            self._guarded(self._observe, self._in_flight.popleft())
        result = super().update_from_output(scheduler_output, model_runner_output)
        if not self.running and not self._in_flight:
            self._completed_s = None  # idle: the next step's time counts from its own start
        return result

    def add_request(self, request: Any) -> None:
        """Queue a request; one whose id is already in use is refused in the log, as an error here ends the engine."""
        existing = self.requests.get(request.request_id)
        if existing is not None and existing.streaming_queue is None:
            logger.error(
                "Request id %r is already in use; the second request is dropped.", request.request_id
            )
            return
        super().add_request(request)
        if self.config.allow_request_slo:
            self._guarded(self._note_promise, request)
        if self._by_deadline:
            self._guarded(self._bring_into_sight, request)
        if self._chunked:
            self._arrived.add(request.request_id)

    def shutdown(self) -> None:
        """End, as the parent does, with the last figures told."""
        if self.telemetry is not None:
            self._guarded(self.telemetry.close)
        super().shutdown()

    def _guarded(self, ours: Callable[..., Any], *args: Any) -> Any:
        """Call code of ours; what it raises is logged and counted, and None is returned."""
        try:
            return ours(*args)
        except Exception:
            self.plan_failures += 1
            logger.error("Planning a step failed; stock scheduling goes on.\n%s", traceback.format_exc())
            return None

    def _apply_plan(self) -> _Step:
        """Ask for a plan and set it on the parent."""
        started_s = self.clock()
        running = self.running
        partial = [request for request in running if request.is_prefill_chunk]
        view, waiting = self._view(started_s, partial)
        plan = self.controller.plan(view)
        take_turns = view.decode_tokens > plan.token_budget
        ordered = [partial[i] for i in plan.prefill_order]
        hidden = [partial[i] for i in plan.held]
        if plan.waiting_order is not None:
            waiting = [waiting[i] for i in plan.waiting_order]
            reorder_waiting(self, waiting)
        if hidden and not can_hide(self, view.decodes, waiting[0] if waiting else None):
            ordered, hidden = ordered + hidden, []
        stalled: list[Any] = []
        if not plan.decodes and self._can_stall(ordered, waiting):
            stalled = [request for request in running if not request.is_prefill_chunk]
            self.running = ordered
        elif take_turns:
            decodes = [request for request in running if not request.is_prefill_chunk]
            decodes.sort(key=lambda request: self._last_served.get(request.request_id, -1))
            self.running = decodes + ordered
        elif hidden or (partial and running[-len(partial) :] != ordered):
            # The parent walks the list from its head and, when KV blocks run out, preempts from its tail: so
            # decodes get their tokens first, and a prefill is preempted before a decode is.
            self.running = [request for request in running if not request.is_prefill_chunk] + ordered
        set_limits(self, plan.token_budget, hidden + stalled, plan.admit, waiting[0] if waiting else None)
        return _Step(
            started_s, view, plan, partial, hidden, stalled, len(self.running), take_turns and not stalled
        )

    def _can_stall(self, partial: list[Any], waiting: list[Any]) -> bool:
        """True where prompts can be read while the decodes stand: else nothing would move."""
        if partial:
            return can_hide(self, 0, partial[0])
        return bool(waiting) and has_slot(self) and can_hide(self, 0, waiting[0])

    def _view(self, now_s: float, partial: list[Any]) -> tuple[StepView, list[Any]]:
        """Return what the policy sees, and the waiting requests in it."""
        policy = self.controller.policy
        running = self.running
        generating = decodes = len(running) - len(partial)
        if self._pipelined:  # a decode whose last token is still in the pipeline cannot be in this step
            running = [r for r in running if r.is_prefill_chunk or r.num_tokens > r.num_computed_tokens]
            decodes = len(running) - len(partial)
        decode_tokens = decodes
        if self.num_spec_tokens:
            decode_tokens += sum(len(r.spec_token_ids) for r in running if not r.is_prefill_chunk)
        context = sum([r.num_computed_tokens for r in running])
        if partial:
            context -= sum([r.num_computed_tokens for r in partial])
        waiting: list[Any] = []
        unseen = self.get_request_counts()[1] if policy.waiting_seen else 0
        if unseen:
            waiting = self._seen_waiting(partial)
            unseen -= len(waiting)
        wall_s = self.wall_clock() if partial or waiting else 0.0
        views: tuple[DecodeView, ...] = ()
        if policy.needs_decode_views:
            views = tuple(self._decode_view(r) for r in self.running if not r.is_prefill_chunk)
        view = StepView(
            now_s=now_s,
            decodes=decodes,
            decode_tokens=decode_tokens,
            decode_context_tokens=context,
            prefills=tuple([self._request_view(request, wall_s) for request in partial]),
            waiting=tuple([self._request_view(request, wall_s) for request in waiting]),
            max_tokens=self.max_num_scheduled_tokens,
            unseen_waiting=unseen,
            decode_views=views,
            decodes_elsewhere=generating - decodes,
            in_flight=self._inside() if self._pipelined or policy.needs_decode_views else (),
        )
        return view, waiting

    def _inside(self) -> tuple[InFlight, ...]:
        return tuple(InFlight(s.started_s, s.predicted_s or 0.0) for s in self._in_flight if s is not None)

    def _seen_waiting(self, partial: list[Any]) -> list[Any]:
        """Return the waiting requests, from the head of the queue, that the policy is to see."""
        policy = self.controller.policy
        if policy.sees_one_step:
            return self._within_one_step(partial, itertools.islice(self.waiting, policy.waiting_seen))
        looks_far = self._by_deadline and self._step % LOOK_FAR_EVERY_STEPS == 0
        return list(self.waiting if looks_far else itertools.islice(self.waiting, policy.waiting_seen))

    def _within_one_step(self, partial: list[Any], waiting: Iterable[Any]) -> list[Any]:
        """Return the first of `waiting`, as many as a step of the engine's limit can reach after `partial`."""
        room = self.max_num_scheduled_tokens
        for request in partial:
            room -= request.num_tokens - request.num_computed_tokens
        reached = []
        for request in waiting:
            if room <= 0:
                break
            room -= request.num_tokens - request.num_computed_tokens
            reached.append(request)
        return reached

    def _request_view(self, request: Any, wall_s: float) -> RequestView:
        done = request.num_computed_tokens
        return RequestView(
            request_id=request.request_id,
            rank=(request.priority if self._by_priority else 0, request.arrival_time),
            age_s=max(0.0, wall_s - request.arrival_time),
            done_tokens=done,
            remaining_tokens=max(1, request.num_tokens - done),
            ttft_slo_s=self._promises.get(request.request_id, NONE).ttft_slo_s,
        )

    def _decode_view(self, request: Any) -> DecodeView:
        promise = self._promises.get(request.request_id, NONE)
        tokens = request.num_output_tokens + request.num_output_placeholders
        return DecodeView(request.request_id, tokens, promise.tbt_slo_s)

    def _note_promise(self, request: Any) -> None:
        params = request.sampling_params
        promise = read_promise(getattr(params, "extra_args", None), self.config)
        if promise is not NONE:
            self._promises[request.request_id] = promise
        if len(self._promises) > 2 * len(self.requests) + 64:  # forget those that have finished
            self._promises = {k: v for k, v in self._promises.items() if k in self.requests}

    def _bring_into_sight(self, request: Any) -> None:
        """Put a request with a deadline where the next step sees it, however long the queue is."""
        if (
            self.config.ttft_slo_ms is not None
            or self._promises.get(request.request_id, NONE).ttft_slo_s is not None
        ):
            move_to_front(self, request)

    def _take_in_arrived(self) -> None:
        """Read the prompts that came during the step before this one shortest first, if the policy wants that."""
        arrived, self._arrived = self._arrived, set()
        if not self._by_priority and 1 < len(arrived) <= self.controller.policy.shortest_first_of:
            sort_newest(self, arrived)

    def _is_stuck(self) -> bool:
        """True where a small budget alone keeps everything from moving.

        Some parts of a prompt cannot be cut (an image, a state-space block): vLLM then takes nothing in a step
        whose budget is below their size, and would take nothing forever.
        """
        return self._empty_steps >= EMPTY_STEPS_BEFORE_FULL_BUDGET

    def _note_shape(self, step: _Step, output: Any, admitted: list[Any]) -> None:
        """Work out what the step computes, and how long it should take."""
        scheduled = output.num_scheduled_tokens
        work, prefills = 0.0, 0
        for request in itertools.chain(step.partial, admitted):
            chunk = scheduled.get(request.request_id)
            if chunk:
                work += chunk_work(request.num_computed_tokens - chunk, chunk)
                prefills += 1
        step.shape = StepShape(
            tokens=output.total_num_scheduled_tokens,
            decodes=len(scheduled) - prefills,
            decode_context_tokens=0 if step.stalled else step.view.decode_context_tokens,
            prefill_work=work,
            sequences=len(scheduled),
        )
        step.predicted_s = self.controller.predict(step.shape)

    def _note(self, step: _Step | None, output: Any) -> None:
        """Keep the books that the next steps need."""
        self._step += 1
        if step is not None and step.decodes_take_turns:
            self._last_served.update(dict.fromkeys(output.num_scheduled_tokens, self._step))
        elif self._last_served:
            self._last_served.clear()
        if output.total_num_scheduled_tokens:
            self._in_flight.append(step)
            self._empty_steps = 0
        elif not self._in_flight and has_runnable_prefill(self):
            self._empty_steps += 1

    def _observe(self, step: _Step | None) -> None:
        """Measure a finished step as a client feels it: from the last completion, if work went on since."""
        now_s = self.clock()
        before_s, self._completed_s = self._completed_s, now_s
        if step is None or step.shape is None:
            return
        record = StepRecord(
            shape=step.shape,
            token_budget=step.plan.token_budget,
            reason=step.plan.reason,
            predicted_s=step.predicted_s,
            measured_s=now_s - (step.started_s if before_s is None else before_s),
            completed_s=now_s,
            started_s=step.started_s,
        )
        self.controller.observe(record)
        if self.telemetry is not None:
            self.telemetry.note(record, len(self.running), self.get_request_counts()[1])


class AsyncSarathiScheduler(SarathiScheduler, AsyncScheduler):  # type: ignore[misc, valid-type]
    """SarathiScheduler with the books of vLLM's asynchronous scheduler."""
