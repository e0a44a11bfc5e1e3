"""A faster way through vLLM's own scheduler for decodes to which nothing can happen in this step.

Most running requests in most steps are *steady*: they decode one token and do not finish. For those, vLLM's `schedule`
and `update_from_output` only count, at some ten microseconds a request, and take a KV block now and then. The class
made here takes them out of the parent's sight for the step, counts for them, takes their blocks from vLLM's own
KV-cache managers, and lets the parent decide all the rest. A request is hidden only where what the parent decides
cannot depend on it:

- hidden requests come before every partial prefill in `running`, and the budget is lowered by what they take;
- enough KV blocks are free that the parent cannot preempt anyone in this step;
- one running request, the lead, always stays visible, because vLLM asks whether there is any.

Hidden requests mostly stay hidden for many steps: a `_Group` remembers them until one arrives, ends, or nears its end.

A step is *quiet* where nobody else is there: nobody waits, all that run are of one group, and its lead is steady, too.
The parent would only count, so it is not asked at all, before the step or after it.

`tests/simulation/test_express.py` compares the two ways step by step. Only simulations use this.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.engine.vllm.contract import scheduler_classes
from vllm_sarathi.engine.vllm.internals import request_status, scheduler_output_class
from vllm_sarathi.engine.vllm.limits import slot_limits

TOKEN = 0
"""What every modelled model says; simulated requests ignore what it means."""


LOOK_AGAIN_STEPS = 64
"""Steps with the same group after which those that it left visible are looked at again."""


@dataclass(slots=True)
class _Members:
    """Requests that are counted together.

    Attributes:
        requests: the requests.
        names: each with its one token of a step.
        token_lists: the lists that their tokens are kept in.
    """

    requests: list[Any]
    names: dict[str, int]
    token_lists: list[list[int]]


@dataclass(slots=True)
class _Group:
    """Requests that are hidden together.

    Attributes:
        head: the running requests before the first partial prefill, when the group was made.
        steady: those of them that are hidden.
        visible: the others.
        growing: who needs a block, by steps from the first on, modulo the block size.
        context: tokens that the hidden ones read from the KV cache, summed.
        left: for how many more steps nothing can happen to them.
        everyone: those of a quiet step; None where something can happen to one that is visible.
        lead_grows: when the lead needs a block, as in `growing`.
        step: how many steps it has been through.
    """

    head: list[Any]
    steady: _Members
    visible: list[Any]
    growing: list[list[Any]]
    context: int
    left: int
    everyone: _Members | None = None
    lead_grows: int = 0
    step: int = 0


@dataclass(slots=True)
class _Passage:
    """A step's hidden requests, and what else it computes.

    Attributes:
        members: the requests that are hidden.
        visible: tokens of the others.
        context: tokens that the hidden ones read from the KV cache, summed.
        plain_steps: how many steps the parent had decided alone when this one was scheduled.
        balanced: another step of the same requests begins where this one ends: what the one adds to the counts of
            what is in flight, the other takes away, and neither is done.
        quiet: whether the parent was not asked for it.
    """

    members: _Members
    visible: dict[str, int]
    context: int = 0
    plain_steps: int = 0
    balanced: bool = False
    quiet: bool = False

    @property
    def steady(self) -> list[Any]:
        """The requests that are hidden."""
        return self.members.requests


NOBODY = _Members([], {}, [])


class ExpressLane:
    """A mix-in between our scheduler and vLLM's: see the module. `type(...)` puts it before vLLM's class."""

    in_flight = 1
    """Steps that are in flight when one is waited for; the simulator says it."""

    running: list[Any]
    block_size: int
    max_model_len: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        self._caching = bool(me.vllm_config.cache_config.enable_prefix_caching)
        self._asynchronous = bool(me.scheduler_config.async_scheduling)
        self._running_status = request_status().RUNNING
        self._has_express = not (
            me.num_spec_tokens
            or me.lora_config
            or me.use_v2_model_runner
            or me.scheduler_config.long_prefill_token_threshold
            or me.connector is not None
        )
        self._managers = me.kv_cache_manager.coordinator.single_type_managers
        self._slots = slot_limits(self)
        self._group: _Group | None = None
        self._under_way: deque[_Passage] = deque()
        self._plain_steps = 0
        self._scheduled_last: _Members | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule one step as the parent does."""
        parent: Any = super()
        group, visible = self._split() if self._has_express else (None, self.running)
        growing = group.growing[group.step % self.block_size] if group else ()
        if group is not None and group.everyone is not None and self._is_quiet(group, visible, len(growing)):
            return self._pass_quietly(group, group.everyone, growing)
        self._scheduled_last = None
        if group is None or not self._nothing_can_be_preempted(
            len(group.steady.requests), visible, len(growing)
        ):
            self._group = None
            self._plain_steps += 1
            output = parent.schedule(*args, **kwargs)
            self._enter(output, _Passage(NOBODY, output.num_scheduled_tokens))
            return output
        running, count, seen = self.running, len(group.steady.requests), len(visible)
        self._take_blocks(growing)  # before the parent looks at how many are free
        self._hide(count)
        self.running = visible
        output = parent.schedule(*args, **kwargs)
        self._hide(-count)
        assert len(visible) >= seen, "the parent preempted where it cannot"
        running += visible[seen:]
        self.running = running
        self._advance(_Passage(group.steady, output.num_scheduled_tokens, group.context), output)
        group.context += count
        me: Any = self
        me.prev_step_scheduled_req_ids.update(group.steady.names)
        output.num_scheduled_tokens = {**group.steady.names, **output.num_scheduled_tokens}
        output.total_num_scheduled_tokens += count
        return output

    def settle(self, output: Any) -> list[str]:
        """Count a finished step's tokens for the hidden requests; return the names that the parent is to hear of."""
        passage: _Passage = output.express
        assert self._under_way.popleft() is passage, "steps finish in their order"
        steady, waiting = passage.steady, self._asynchronous
        token_lists = passage.members.token_lists
        if passage.plain_steps != self._plain_steps:
            steady = self._still_steady(passage)
            token_lists = _token_lists(steady)
        for tokens in token_lists:
            tokens.append(TOKEN)
        if not passage.balanced:
            for request in steady:
                request.num_in_flight_tokens -= 1
                if waiting:
                    request.num_output_placeholders -= 1
        if self._caching:
            for request in steady:
                request.update_block_hashes()
        return list(passage.visible)

    def _still_steady(self, passage: _Passage) -> list[Any]:
        """Show the parent those that were preempted or ended since: it knows what to do; return the others."""
        steady = []
        for request in passage.steady:
            if request.num_stale_output_tokens or request.status is not self._running_status:
                passage.visible[request.request_id] = 1
            else:
                steady.append(request)
        return steady

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take in a finished step, after `settle`."""
        express: _Passage = scheduler_output.express
        if express.quiet and not express.visible:  # nobody has been preempted or has ended since
            return {}
        everything = scheduler_output.num_scheduled_tokens
        scheduler_output.num_scheduled_tokens = express.visible
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        scheduler_output.num_scheduled_tokens = everything
        return result

    def _split(self) -> tuple[_Group | None, list[Any]]:
        """Return the requests that are hidden in this step, None without any, and all the others in their order."""
        group, running = self._group, self.running
        if group is not None:
            group.step += 1
            group.left -= 1
            size = len(group.head)
            rest = running[size:]
            if group.left >= 0 and running[:size] == group.head and (not rest or rest[0].is_prefill_chunk):
                return group, group.visible + rest
        self._group = group = self._new_group()
        return (group, group.visible + running[len(group.head) :]) if group else (None, running)

    def _new_group(self) -> _Group | None:
        """Look at each running request."""
        size, longest = self.block_size, self.max_model_len - 3
        caching = self._caching
        head: list[Any] = []
        steady: list[Any] = []
        visible: list[Any] = []
        growing: list[list[Any]] = [[] for _ in range(size)]
        # Where blocks are hashed, and where steps of several groups overlap, it has to be looked at every time.
        left = 0 if caching or not (self._asynchronous or self.in_flight == 1) else LOOK_AGAIN_STEPS
        lead_left = -1
        for request in self.running:
            if request.is_prefill_chunk:
                break
            head.append(request)
            computed = request.num_computed_tokens
            offset = computed % size
            until = min(request.num_prompt_tokens + request.max_tokens - 3, longest)
            is_steady = (
                (offset or not caching)
                and len(request._all_token_ids) + request.num_output_placeholders - computed == 1
                and computed < until
                and not (caching and (offset == size - 1 or request.num_output_placeholders))
            )
            if is_steady and visible:
                steady.append(request)
                growing[-offset % size].append(request)
                left = min(left, until - 1 - computed)
            else:
                lead_left = until - 1 - computed if is_steady else -1
                visible.append(request)
        me: Any = self
        # A KV connector is told of each step, and tells who may go.
        may_be_quiet = len(visible) == 1 and lead_left >= 0 and me.connector is None
        if not steady and not may_be_quiet:
            return None
        context = sum(request.num_computed_tokens for request in steady)
        group = _Group(head, _members(steady), visible, growing, context, left)
        if may_be_quiet:
            group.everyone, group.left = _members(head), min(left, lead_left)
            group.lead_grows = -visible[0].num_computed_tokens % size
        return group

    def _is_quiet(self, group: _Group, visible: list[Any], growing: int) -> bool:
        """True where nobody is there but the group: nobody waits, and the parent has nobody's end to tell of."""
        me: Any = self
        return bool(
            len(visible) == 1
            and len(me.requests) == len(group.head) <= self.max_num_scheduled_tokens
            and not me.finished_req_ids
            and growing + 1 < me.kv_cache_manager.block_pool.get_num_free_blocks()
        )

    def _pass_quietly(self, group: _Group, everyone: _Members, growing: Sequence[Any]) -> Any:
        """Return the output of a quiet step."""
        me: Any = self
        lead = group.visible[0]
        self._take_blocks(growing)
        if group.step % self.block_size == group.lead_grows:
            self._take_blocks((lead,))
        output = scheduler_output_class().make_empty()
        output.num_scheduled_tokens = everyone.names
        output.total_num_scheduled_tokens = len(everyone.names)
        context = group.context + lead.num_computed_tokens
        self._advance(_Passage(everyone, {}, context, quiet=True), output)
        group.context += len(group.steady.requests)
        if self._scheduled_last is not everyone:  # who left was told of in a step of the parent's
            self._scheduled_last = everyone
            me.prev_step_scheduled_req_ids.update(everyone.names)
        return output

    def _take_blocks(self, growing: Sequence[Any]) -> None:
        """Take a block of each kind for those whose next token has no room in theirs."""
        for request in growing:
            tokens = request.num_computed_tokens + 1
            for manager in self._managers:
                manager.allocate_new_blocks(request.request_id, tokens, tokens)

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

    def _enter(self, output: Any, passage: _Passage) -> None:
        """Note that a step is under way."""
        passage.plain_steps = self._plain_steps
        output.express = passage
        self._under_way.append(passage)

    def _advance(self, passage: _Passage, output: Any) -> None:
        """Do for the hidden requests what the parent does for the others after scheduling."""
        self._enter(output, passage)
        steady, waiting = passage.steady, self._asynchronous
        oldest = self._under_way[0]
        oldest.balanced = len(self._under_way) == self.in_flight and oldest.steady is steady
        for request in steady:
            request.num_computed_tokens += 1
        if not oldest.balanced:
            for request in steady:
                request.num_in_flight_tokens += 1
                if waiting:
                    request.num_output_placeholders += 1


def _members(requests: list[Any]) -> _Members:
    names = {request.request_id: 1 for request in requests}
    return _Members(requests, names, _token_lists(requests))


def _token_lists(requests: Sequence[Any]) -> list[list[int]]:
    return [tokens for request in requests for tokens in (request._output_token_ids, request._all_token_ids)]


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
