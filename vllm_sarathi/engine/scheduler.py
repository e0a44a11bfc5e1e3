"""SarathiScheduler: vLLM's own scheduler, told at each step how much to take and whom to serve first.

The parent's `schedule` is never copied. Before each step we look at its queues, ask the controller for a
plan, set what the plan says (the token budget, the order of `running`), call the parent, and restore.
"""

import traceback
from typing import Any

from vllm_sarathi.core.config import config_from_additional
from vllm_sarathi.core.controller import Controller
from vllm_sarathi.core.views import RequestView, StepPlan, StepView
from vllm_sarathi.engine import vllm_api

Scheduler, AsyncScheduler = vllm_api.scheduler_classes()

EMPTY_STEPS_BEFORE_FULL_BUDGET = 3
"""After this many steps that took nothing, the engine's own limit applies for one step: see `_is_stuck`."""


class SarathiScheduler(Scheduler):  # type: ignore[misc, valid-type]  # the parent is resolved at run time
    """Stall-free, hybrid batches under a token budget (Sarathi-Serve, arXiv 2403.02310, section 4).

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
        vllm_api.raise_violations(vllm_api.missing_scheduler_attributes(self))
        config = config_from_additional(vllm_config.additional_config)
        # vLLM may switch chunking off after the model has loaded (non-causal layers): then stay out of its way.
        self._chunked = bool(self.scheduler_config.enable_chunked_prefill)
        if self._chunked:
            vllm_api.check_engine(vllm_config, config)
        else:
            vllm_api.logger.warning("vLLM has switched chunked prefill off; its stock scheduling applies.")
        self._controller = Controller(config)
        self._by_priority = vllm_api.is_priority_policy(self)
        self._steps_in_flight = 0
        self._empty_steps = 0
        self._step = 0
        self._last_served: dict[str, int] = {}
        self.plan_failures = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule one step by the controller's plan; arguments and result are the parent's."""
        if not self._chunked:
            return super().schedule(*args, **kwargs)
        engine_limit = self.max_num_scheduled_tokens
        decodes_take_turns = False
        try:
            if not self._is_stuck():
                decodes_take_turns = self._apply_plan()
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = engine_limit
        self._note(output, decodes_take_turns)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a finished step; arguments and result are the parent's."""
        if scheduler_output.total_num_scheduled_tokens:
            self._steps_in_flight -= 1
        return super().update_from_output(scheduler_output, model_runner_output)

    def add_request(self, request: Any) -> None:
        """Queue a request; one whose id is already in use is refused in the log, as an error here ends the engine."""
        existing = self.requests.get(request.request_id)
        if existing is not None and existing.streaming_queue is None:
            vllm_api.logger.error(
                "Request id %r is already in use; the second request is dropped.", request.request_id
            )
            return
        super().add_request(request)

    def _apply_plan(self) -> bool:
        """Ask for a plan and set it on the parent; return whether decodes have to take turns."""
        running = self.running
        partial = [request for request in running if request.is_prefill_chunk]
        try:
            view = self._view(partial)
            plan = self._controller.plan(view)
        except Exception:
            # An exception here would end the engine for every client; a stock step costs one promise.
            self.plan_failures += 1
            vllm_api.logger.error("Planning a step failed; taking a stock step.\n%s", traceback.format_exc())
            return False
        self.max_num_scheduled_tokens = plan.token_budget
        decodes_take_turns = view.decode_tokens > plan.token_budget
        if decodes_take_turns:
            decodes = [request for request in running if not request.is_prefill_chunk]
            decodes.sort(key=lambda request: self._last_served.get(request.request_id, -1))
            self.running = decodes + self._ordered(partial, plan)
        elif partial:
            self._put_decodes_first(partial, plan)
        return decodes_take_turns

    def _put_decodes_first(self, partial: list[Any], plan: StepPlan) -> None:
        """Order `running` as decodes, then partial prefills in the plan's order.

        The parent walks the list from its head and, when KV blocks run out, preempts from its tail: so
        decodes get their tokens first, and a prefill is preempted before a decode is.
        """
        ordered = self._ordered(partial, plan)
        if self.running[-len(partial) :] != ordered:
            self.running = [request for request in self.running if not request.is_prefill_chunk] + ordered

    @staticmethod
    def _ordered(partial: list[Any], plan: StepPlan) -> list[Any]:
        return [partial[i] for i in plan.prefill_order]

    def _view(self, partial: list[Any]) -> StepView:
        decodes = len(self.running) - len(partial)
        decode_tokens = decodes
        if self.num_spec_tokens:
            decode_tokens += sum(len(r.spec_token_ids) for r in self.running if not r.is_prefill_chunk)
        return StepView(
            decodes=decodes,
            decode_tokens=decode_tokens,
            prefills=tuple(self._request_view(request) for request in partial),
            max_tokens=self.max_num_scheduled_tokens,
        )

    def _request_view(self, request: Any) -> RequestView:
        return RequestView(
            request_id=request.request_id,
            rank=(request.priority if self._by_priority else 0, request.arrival_time),
            done_tokens=request.num_computed_tokens,
            remaining_tokens=request.num_tokens - request.num_computed_tokens,
        )

    def _is_stuck(self) -> bool:
        """True where a small budget alone keeps everything from moving.

        Some parts of a prompt cannot be cut (an image, a state-space block): vLLM then takes nothing in a step
        whose budget is below their size, and would take nothing forever.
        """
        return self._empty_steps >= EMPTY_STEPS_BEFORE_FULL_BUDGET

    def _note(self, output: Any, decodes_take_turns: bool) -> None:
        """Keep the books that the next steps need."""
        self._step += 1
        if decodes_take_turns:
            self._last_served.update(dict.fromkeys(output.num_scheduled_tokens, self._step))
        elif self._last_served:
            self._last_served.clear()
        if output.total_num_scheduled_tokens:
            self._steps_in_flight += 1
            self._empty_steps = 0
        elif self._steps_in_flight == 0 and vllm_api.has_runnable_prefill(self):
            self._empty_steps += 1


class AsyncSarathiScheduler(SarathiScheduler, AsyncScheduler):  # type: ignore[misc, valid-type]
    """SarathiScheduler with the books of vLLM's asynchronous scheduler."""
