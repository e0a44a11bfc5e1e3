"""What bounds a step of vLLM's scheduler, set for one step and put back after it."""

from collections.abc import Iterable
from typing import Any

from vllm_sarathi.engine.vllm.protocols import Request
from vllm_sarathi.engine.vllm.queues import waiting_requests

SLOT_LIMITS = ("max_num_running_reqs", "max_num_active_reqs")
"""What bounds the requests that run; `max_num_active_reqs` came with vLLM 0.31."""

UNBOUNDED = 1 << 30
"""More tokens than any request has."""

LIMITS = ("max_num_scheduled_tokens", *SLOT_LIMITS)
"""What bounds a step."""


def save_limits(scheduler: Any) -> list[tuple[str, int]]:
    """Return the limits of a step, for `restore_limits`."""
    return [(name, getattr(scheduler, name)) for name in LIMITS if hasattr(scheduler, name)]


def restore_limits(scheduler: Any, limits: list[tuple[str, int]]) -> None:
    """Put back what `save_limits` returned."""
    for name, value in limits:
        setattr(scheduler, name, value)


def set_limits(scheduler: Any, token_budget: int, hidden: int, let_in: int | None) -> None:
    """Set the limits of one step.

    Args:
        scheduler: vLLM's, whose `running` the hidden requests have been taken out of.
        token_budget: tokens of the step.
        hidden: how many running requests the step leaves out; they keep their slots.
        let_in: the most waiting requests to let in; None for as many as there are slots.
    """
    scheduler.max_num_scheduled_tokens = token_budget
    if hidden or let_in is not None:
        for name in slot_limits(scheduler):
            left = getattr(scheduler, name) - hidden
            if let_in is not None:
                left = min(left, len(scheduler.running) + let_in)
            setattr(scheduler, name, left)


def most_of_one(scheduler: Any) -> int:
    """Return the most tokens that vLLM gives one request in the next step, beside what bounds the whole step.

    `--long-prefill-token-threshold` is left aside where a request is alone, and with `-adaptive` never below its even
    part of the engine's limit.
    """
    config = scheduler.scheduler_config
    most = int(config.long_prefill_token_threshold)
    if most and (requests := sum(scheduler.get_request_counts())) > 1:
        adaptive = getattr(config, "long_prefill_token_threshold_adaptive", False)
        return max(most, config.max_num_batched_tokens // requests) if adaptive else most
    return UNBOUNDED


def sees_all_waiting(scheduler: Any) -> bool:
    """Whether vLLM asks `_handle_blocked_waiting_request` of all that it would let in, as it does since 0.31."""
    return not hasattr(scheduler, "_try_promote_blocked_waiting_request")


def look_at_waiting(scheduler: Any, request: Request) -> None:
    """Have vLLM look at a request whose status keeps it waiting, as it would at the head of the queue."""
    if sees_all_waiting(scheduler):
        scheduler._handle_blocked_waiting_request(request)
    else:
        scheduler._try_promote_blocked_waiting_request(request)


def adapters_contend(scheduler: Any) -> bool:
    """Whether adapters wait for each other's slots, and this vLLM would let in more than fit.

    vLLM 0.30 counts the adapters of those that a step serves, and asserts that they fit; a small budget, or a turn that
    is given to others, leaves running requests out of a step, and the next one holds all of them.
    """
    if not scheduler.lora_config or sees_all_waiting(scheduler):
        return False
    wanted = adapters_of((*scheduler.running, *waiting_requests(scheduler)))
    return len(wanted) > int(scheduler.lora_config.max_loras)


def adapters_of(requests: Iterable[Request]) -> set[int]:
    """Return the adapters of the requests, by vLLM's numbers."""
    return {
        request.lora_request.lora_int_id
        for request in requests
        if request.lora_request and request.lora_request.lora_int_id > 0
    }


def slot_limits(scheduler: Any) -> tuple[str, ...]:
    """Return the names of the limits on the requests that run, as far as this vLLM has them."""
    return tuple(name for name in SLOT_LIMITS if hasattr(scheduler, name))
