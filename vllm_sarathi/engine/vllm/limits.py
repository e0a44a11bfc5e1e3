"""What bounds a step of vLLM's scheduler, set for one step and put back after it."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_sarathi.engine.vllm.queues import waiting_requests

SLOT_LIMITS = ("max_num_running_reqs", "max_num_active_reqs")
"""What bounds the requests that run; `max_num_active_reqs` came with vLLM 0.31."""

LIMITS = ("max_num_scheduled_tokens", "lora_config", *SLOT_LIMITS)
"""What bounds a step."""


def save_limits(scheduler: Any) -> list[tuple[str, Any]]:
    """Return the limits of a step, for `restore_limits`."""
    return [(name, getattr(scheduler, name)) for name in LIMITS if hasattr(scheduler, name)]


def restore_limits(scheduler: Any, limits: list[tuple[str, Any]]) -> None:
    """Put back what `save_limits` returned."""
    for name, value in limits:
        setattr(scheduler, name, value)


def set_limits(
    scheduler: Any,
    token_budget: int,
    hidden: Sequence[Any] = (),
    let_in: int | None = None,
    first: Any | None = None,
) -> None:
    """Set the token budget, and take what hidden requests hold out of what the step can give.

    They keep their slots, and their adapters: the next step runs them beside whom this one lets in, and vLLM asserts
    that all adapters of a step fit.

    Args:
        scheduler: vLLM's, whose `running` the hidden requests have been taken out of.
        token_budget: tokens of the step.
        hidden: running requests that the step leaves out.
        let_in: the most waiting requests to let in; None for as many as there are slots.
        first: the waiting request that is to be let in first, if it can run; None for none.
    """
    scheduler.max_num_scheduled_tokens = token_budget
    if hidden or let_in is not None:
        for name in slot_limits(scheduler):
            left = getattr(scheduler, name) - len(hidden)
            if let_in is not None:
                left = min(left, len(scheduler.running) + let_in)
            setattr(scheduler, name, left)
    if hidden and scheduler.lora_config:
        _keep_adapters(scheduler, hidden, first)


def _keep_adapters(scheduler: Any, hidden: Sequence[Any], first: Any | None) -> None:
    """Lower the number of adapters by those that only hidden requests use.

    The parent does not see those, and would refuse them to `first`, too: for it, one is left. That is safe only where
    the parent cannot pass over it, and let in another.
    """
    held = adapters_of(hidden) - adapters_of(scheduler.running)
    if not held:
        return
    left = scheduler.lora_config.max_loras - len(held)
    certain = scheduler.connector is None and scheduler.ec_connector is None
    if first is not None and certain and adapters_of((first,)) & held:
        left += next(waiting_requests(scheduler), None) is first
    scheduler.lora_config = copy.copy(scheduler.lora_config)
    object.__setattr__(scheduler.lora_config, "max_loras", left)  # its own validation wants one at least


def adapters_of(requests: Iterable[Any]) -> set[int]:
    """Return the adapters of the requests, by vLLM's numbers."""
    return {
        request.lora_request.lora_int_id
        for request in requests
        if request.lora_request and request.lora_request.lora_int_id > 0
    }


def slot_limits(scheduler: Any) -> tuple[str, ...]:
    """Return the names of the limits on the requests that run, as far as this vLLM has them."""
    return tuple(name for name in SLOT_LIMITS if hasattr(scheduler, name))
