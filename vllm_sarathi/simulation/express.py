"""A faster way through vLLM's own scheduler for decodes to which nothing can happen in this step.

Most running requests in most steps are *steady*: they decode one token and do not finish. For those, vLLM's `schedule`
and `update_from_output` only count, at some ten microseconds a request, and take a KV block now and then. The class
made here takes them out of the parent's sight for the step, counts for them, takes their blocks from vLLM's own
KV-cache coordinator, and lets the parent decide all the rest. A request is hidden only where what the parent decides
cannot depend on it:

- hidden requests come before every partial prefill in `running`, and the budget is lowered by what they take;
- so many KV blocks are free that the parent cannot preempt anyone in this step;
- one running request always stays visible, because vLLM asks whether there is any.

`tests/simulation/test_express.py` compares the two ways step by step. Only simulations use this.
"""

import functools
from typing import Any

from vllm_sarathi.engine.vllm_api import LIMITS, import_internal, scheduler_classes

TOKEN = 0
"""What every modelled model says; simulated requests ignore what it means."""


class ExpressLane:
    """A mix-in between our scheduler and vLLM's: see the module. `type(...)` puts it before vLLM's class."""

    running: list[Any]
    block_size: int
    max_model_len: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        self._caching = bool(me.vllm_config.cache_config.enable_prefix_caching)
        self._asynchronous = bool(me.scheduler_config.async_scheduling)
        self._running_status = import_internal("vllm.v1.request").RequestStatus.RUNNING
        self._has_express = not (
            me.num_spec_tokens
            or me.lora_config
            or me.use_v2_model_runner
            or me.scheduler_config.long_prefill_token_threshold
            or me.connector is not None
        )
        self._coordinator = me.kv_cache_manager.coordinator
        self._slots = tuple(name for name in LIMITS[1:] if hasattr(self, name))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule one step as the parent does."""
        parent: Any = super()
        steady, visible, growing = self._split() if self._has_express else ([], self.running, [])
        if not steady or not self._nothing_can_be_preempted(len(steady), visible, len(growing)):
            output = parent.schedule(*args, **kwargs)
            output.express = ((), output.num_scheduled_tokens)
            return output
        running, count, seen = self.running, len(steady), len(visible)
        for request in growing:  # before the parent looks at how many blocks are free
            tokens = request.num_computed_tokens + 1
            self._coordinator.allocate_new_blocks(request.request_id, tokens, tokens)
        self._hide(count)
        self.running = visible
        output = parent.schedule(*args, **kwargs)
        self._hide(-count)
        assert len(visible) >= seen, "the parent preempted where it cannot"
        running += visible[seen:]
        self.running = running
        self._advance(steady, output)
        return output

    def settle(self, output: Any) -> list[str]:
        """Count a finished step's tokens for the hidden requests; return the names that the parent is to hear of."""
        steady, visible = output.express
        asynchronous = self._asynchronous
        for request in steady:
            if request.num_stale_output_tokens or request.status is not self._running_status:
                visible[request.request_id] = 1  # preempted or ended since: the parent knows what to do
                continue
            request.num_in_flight_tokens -= 1
            request._output_token_ids.append(TOKEN)
            request._all_token_ids.append(TOKEN)
            if asynchronous:
                request.num_output_placeholders -= 1
        if self._caching:
            for request in steady:
                request.update_block_hashes()
        return list(visible)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a finished step, after `settle`."""
        everything = scheduler_output.num_scheduled_tokens
        scheduler_output.num_scheduled_tokens = scheduler_output.express[1]
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        scheduler_output.num_scheduled_tokens = everything
        return result

    def _split(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Return the requests that are steady, the other running ones in their order, and who needs a block."""
        size, longest = self.block_size, self.max_model_len - 3
        caching = self._caching
        steady: list[Any] = []
        visible: list[Any] = []
        growing: list[Any] = []
        running = iter(self.running)
        for request in running:
            if request.is_prefill_chunk:
                visible.append(request)
                break
            computed = request.num_computed_tokens
            offset = computed % size
            if (
                (offset or not caching)
                and visible
                and len(request._all_token_ids) + request.num_output_placeholders - computed == 1
                and computed + 3 < request.num_prompt_tokens + request.max_tokens
                and computed < longest
                and not (caching and (offset == size - 1 or request.num_output_placeholders))
            ):
                steady.append(request)
                if not offset:
                    growing.append(request)
            else:
                visible.append(request)
        visible += running
        return steady, visible, growing

    def _nothing_can_be_preempted(self, count: int, visible: list[Any], growing: int) -> bool:
        me: Any = self
        left = self.max_num_scheduled_tokens - count
        needed = left // self.block_size + 2 * len(visible) + growing
        # In a pipeline, those whose last token is still under way take nothing.
        decodes = sum(
            not request.is_prefill_chunk
            and request.num_tokens + request.num_output_placeholders > request.num_computed_tokens
            for request in visible
        )
        return bool(left >= max(1, decodes) and needed < me.kv_cache_manager.block_pool.get_num_free_blocks())

    def _hide(self, count: int) -> None:
        self.max_num_scheduled_tokens -= count
        for name in self._slots:
            setattr(self, name, getattr(self, name) - count)

    def _advance(self, steady: list[Any], output: Any) -> None:
        """Do for the hidden requests what the parent does for the others after scheduling."""
        me: Any = self
        asynchronous = self._asynchronous
        for request in steady:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            if asynchronous:
                request.num_output_placeholders += 1
        visible = output.num_scheduled_tokens
        everything = {request.request_id: 1 for request in steady}
        me.prev_step_scheduled_req_ids.update(everything)
        everything.update(visible)
        output.num_scheduled_tokens = everything
        output.total_num_scheduled_tokens += len(steady)
        output.express = (steady, visible)


@functools.cache
def express_class(scheduler_cls: type[Any] | None, asynchronous: bool) -> type[Any]:
    """Return a scheduler class that schedules as `scheduler_cls` does, faster.

    Args:
        scheduler_cls: a subclass of vLLM's class; None for vLLM's own.
        asynchronous: whether vLLM's asynchronous scheduler is the parent.
    """
    parent = scheduler_classes()[asynchronous]
    lane = type("ExpressParent", (ExpressLane, parent), {})
    if scheduler_cls is None:
        return lane
    return type("Express" + scheduler_cls.__name__, (scheduler_cls, lane), {})
