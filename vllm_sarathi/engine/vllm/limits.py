"""What bounds a step of vLLM's scheduler, set for one step and put back after it."""

from typing import Any

SLOT_LIMITS = ("max_num_running_reqs", "max_num_active_reqs")
"""What bounds the requests that run; `max_num_active_reqs` came with vLLM 0.31."""

LIMITS = ("max_num_scheduled_tokens", *SLOT_LIMITS)
"""What bounds a step."""


def save_limits(scheduler: Any) -> list[tuple[str, int]]:
    """Return the limits of a step, for `restore_limits`."""
    return [(name, getattr(scheduler, name)) for name in LIMITS if hasattr(scheduler, name)]


def restore_limits(scheduler: Any, limits: list[tuple[str, int]]) -> None:
    """Put back what `save_limits` returned."""
    for name, value in limits:
        setattr(scheduler, name, value)


def set_limits(scheduler: Any, token_budget: int, hidden: int, admit: bool = True) -> None:
    """Set the token budget, and take the slots of requests that are hidden from `running` out of the count.

    Without `admit` no slot is left for a waiting request.
    """
    scheduler.max_num_scheduled_tokens = token_budget
    if hidden or not admit:
        for name in slot_limits(scheduler):
            left = getattr(scheduler, name) - hidden if admit else len(scheduler.running)
            setattr(scheduler, name, left)


def slot_limits(scheduler: Any) -> tuple[str, ...]:
    """Return the names of the limits on the requests that run, as far as this vLLM has them."""
    return tuple(name for name in SLOT_LIMITS if hasattr(scheduler, name))
