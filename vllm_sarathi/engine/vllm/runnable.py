"""Whether a waiting request can run in the next step, in the terms in which vLLM's `schedule` decides."""

from typing import Any

from vllm_sarathi.engine.vllm.internals import pause_state, request_status
from vllm_sarathi.engine.vllm.limits import slot_limits


def has_runnable_prefill(scheduler: Any) -> bool:
    """True where nothing but the token budget keeps a request from being scheduled: it is not blocked or paused."""
    if scheduler.pause_state != pause_state().UNPAUSED:
        return False
    if any(request.is_prefill_chunk for request in scheduler.running):
        return True
    if not scheduler.waiting:
        return False
    status = request_status()
    return scheduler.waiting.peek_request().status in (status.WAITING, status.PREEMPTED)


def can_hide(scheduler: Any, decodes: int, first: Any | None) -> bool:
    """True where a step can do without preempting: a hidden request's KV blocks are out of the parent's reach.

    Args:
        scheduler: vLLM's.
        decodes: requests that decode in the step.
        first: the request that is to be read first; None for none.
    """
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    prompt_blocks = first.num_tokens // scheduler.block_size if first is not None else 0
    return bool(free > 2 * decodes + prompt_blocks + 2)


def has_slot(scheduler: Any) -> bool:
    """True where one more request may run."""
    limits = [getattr(scheduler, name) for name in slot_limits(scheduler)]
    return bool(len(scheduler.running) < min(limits))
