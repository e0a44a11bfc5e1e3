"""A queue of waiting requests for orders that look beyond its head: any of them comes to the front in constant time."""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vllm_sarathi.core.order.base import Order
from vllm_sarathi.core.order.index import WaitingIndex
from vllm_sarathi.engine.vllm.internals import resolve

HEAD_SEEN = 64
"""Requests that are seen from the queue's head where the index has failed."""


class TurnQueue:
    """vLLM's queue in the order in which it was put, with an index by the keys of an order of ours.

    Args:
        order: says what is to be seen.
        keys: a waiting request's keys, as `Order.keys`.
        note_fault: takes what the keys or the index raise; from then on the queue shows its head, as vLLM's own does.
    """

    def __init__(
        self,
        order: Order,
        keys: Callable[[Any], Mapping[str, float]],
        note_fault: Callable[[Exception], None],
    ) -> None:
        self._requests: OrderedDict[Any, None] = OrderedDict()
        self._index: WaitingIndex[Any] = WaitingIndex(order.lists)
        self._keys = keys
        self._note_fault = note_fault
        self._sound = True

    def _indexed(self, change: Callable[[Any], None], request: Any) -> None:
        """Change the index: an error of ours in it must not end the engine."""
        if self._sound:
            try:
                change(request)
            except Exception as error:
                self._sound = False
                self._note_fault(error)

    def _add_to_index(self, request: Any) -> None:
        self._index.add(request, self._keys(request))

    def add_request(self, request: Any) -> None:
        self._requests[request] = None
        self._indexed(self._add_to_index, request)

    def pop_request(self) -> Any:
        request, _ = self._requests.popitem(last=False)
        self._indexed(self._index.discard, request)
        return request

    def peek_request(self) -> Any:
        if not self._requests:
            raise IndexError("peek from an empty queue")
        return next(iter(self._requests))

    def prepend_request(self, request: Any) -> None:
        self.add_request(request)
        self._requests.move_to_end(request, last=False)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Any) -> None:
        del self._requests[request]
        self._indexed(self._index.discard, request)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            if request in self._requests:
                self.remove_request(request)

    def candidates(self, starts: Mapping[str, float]) -> list[Any]:
        """Return the requests that the order could want next."""
        if not self._sound:
            return list(itertools.islice(self._requests, HEAD_SEEN))
        return self._index.candidates(starts)

    def rekey(self, request: Any) -> None:
        """Sort a request anew, whose keys have changed."""
        if request in self._requests:
            self._indexed(self._add_to_index, request)

    def bring_to_front(self, requests: list[Any]) -> None:
        """Bring those requests, in their order, to the head."""
        if all(a is b for a, b in zip(self._requests, requests, strict=False)):
            return
        for request in reversed(requests):
            self._requests.move_to_end(request, last=False)

    def __contains__(self, request: Any) -> bool:
        return request in self._requests

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


@functools.cache
def _queue_class() -> Any:
    """Return the class that vLLM takes for one of its own; its base is imported when it is asked for."""
    base: Any = resolve("vllm.v1.core.sched.request_queue:RequestQueue")
    return type("VllmTurnQueue", (TurnQueue, base), {})


def install_turn_queue(
    scheduler: Any,
    order: Order,
    keys: Callable[[Any], Mapping[str, float]],
    note_fault: Callable[[Exception], None],
) -> None:
    """Give a scheduler a queue for orders that look beyond its head; requests that wait already move into it.

    Args:
        scheduler: vLLM's; its waiting requests are in the order in which they were put.
        order, keys, note_fault: as in `TurnQueue`.
    """
    queue = _queue_class()(order, keys, note_fault)
    for request in scheduler.waiting:
        queue.add_request(request)
    scheduler.waiting = queue
