"""Orders applied to vLLM's queue of waiting requests; what the order is, is decided elsewhere."""

import itertools
from collections.abc import Iterator
from typing import Any


def waiting_requests(scheduler: Any) -> Iterator[Any]:
    """Iterate over all waiting requests in the order in which vLLM looks at them (with priorities: roughly).

    vLLM looks first at those that it has passed over (0.30), or that hold KV blocks (from 0.31 on).
    """
    for name in ("skipped_waiting", "kv_holding_waiting", "waiting"):
        yield from getattr(scheduler, name, ())


def reorder_waiting(scheduler: Any, requests: list[Any]) -> None:
    """Bring the first requests of the queue, as many as `requests`, into the order of `requests`."""
    queue = scheduler.waiting
    if all(a is b for a, b in zip(queue, requests, strict=False)):
        return
    for _ in requests:
        queue.pop_request()
    queue.prepend_requests(reversed(requests))


def move_to_front(scheduler: Any, request: Any) -> None:
    """Bring the request that was queued last to the head of the queue, unless it waits elsewhere."""
    queue = scheduler.waiting
    if len(queue) > 1 and queue[-1] is request:
        queue.pop()
        queue.prepend_request(request)


def sort_newest(scheduler: Any, names: set[str]) -> None:
    """Bring those requests, as far as they are the last of an FCFS queue, into the order of their lengths."""
    queue = scheduler.waiting
    newest = list(itertools.takewhile(lambda request: request.request_id in names, reversed(queue)))
    newest.reverse()  # prompts of the same length stay in their order
    # Sorted before any is taken out: an error in between would lose requests.
    ordered = sorted(newest, key=lambda request: request.num_tokens)
    for _ in ordered:
        queue.pop()
    queue.extend(ordered)
