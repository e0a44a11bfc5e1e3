"""Preemption by our word: vLLM's own way, outside of its `schedule`, as its `reset_prefix_cache` does it."""

import time
from collections.abc import Iterable
from typing import Any

from vllm_sarathi.engine.vllm.protocols import Request


def preempt(scheduler: Any, requests: Iterable[Request]) -> None:
    """Put running requests back into the queue; the next step's output tells the workers.

    Args:
        scheduler: vLLM's; its `running` is changed in place, so that a step that fails finds it as it is now.
        requests: those for which `can_preempt` says so.
    """
    for request in requests:
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic())
        # Where it comes back in the very step, it is to the workers one that they have not seen before.
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def can_preempt(scheduler: Any, request: Request) -> bool:
    """True where the blocks of a running request come free at once, and no connector is to send them elsewhere."""
    return scheduler.connector is None and bool(scheduler._request_blocks_can_be_freed(request))


def freed_blocks(scheduler: Any, request: Request) -> int:
    """Return the KV blocks that come free with a request: those that nobody shares."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = [block for single in managers for block in single.req_to_blocks.get(request.request_id, ())]
    return sum(block.ref_cnt == 1 and not block.is_null for block in held)
