"""Orders applied to vLLM's queue of waiting requests; what the order is, is decided elsewhere."""

from collections.abc import Iterator
from typing import Any

from vllm_sarathi.engine.vllm.protocols import Request


def waiting_requests(scheduler: Any) -> Iterator[Request]:
    """Iterate over all waiting requests in the order in which vLLM looks at them (with priorities: roughly).

    vLLM looks first at those that it has passed over (0.30), or that hold KV blocks (from 0.31 on).
    """
    for name in ("skipped_waiting", "kv_holding_waiting", "waiting"):
        yield from getattr(scheduler, name, ())


def reorder_waiting(scheduler: Any, requests: list[Request]) -> None:
    """Bring waiting requests, in their order, to the head of a queue that `install_turn_queue` has made."""
    if requests and hasattr(scheduler.waiting, "bring_to_front"):
        scheduler.waiting.bring_to_front(requests)
