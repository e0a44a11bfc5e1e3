"""Finds, among any number of waiting requests, the few that an order could want next.

The cost of a step does not depend on how many wait: each request is sorted into the order's lists once, when it begins
to wait, and a step looks at the heads of the lists.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

SLACK = 64
"""Entries of requests that no longer wait are dropped where they outnumber the others by this."""


class WaitingIndex(Generic[Item]):
    """Sorted lists of what waits.

    Args:
        seen: how many to see of each list, as `Order.lists`.
    """

    def __init__(self, seen: Mapping[str, int]) -> None:
        self._seen = dict(seen)
        self._lists: dict[str, list[tuple[float, int, Item]]] = {name: [] for name in seen}
        self._serial = 0
        self._alive: dict[Item, int] = {}

    def __len__(self) -> int:
        return len(self._alive)

    def add(self, item: Item, keys: Mapping[str, float]) -> None:
        """Take in what begins to wait, or whose keys have changed."""
        self._serial += 1
        self._alive[item] = self._serial
        for name, key in keys.items():
            insort(self._lists[name], (key, self._serial, item))

    def discard(self, item: Item) -> None:
        """Forget what waits no longer; its entries are dropped when they are next seen."""
        self._alive.pop(item, None)

    def candidates(self, starts: Mapping[str, float]) -> list[Item]:
        """Return those at the heads of the lists, each once.

        Args:
            starts: from which key on a list is of interest, as `Order.starts`; what is below never is again.
        """
        found: dict[Item, None] = {}
        for name, count in self._seen.items():
            entries = self._lists[name]
            if not entries:
                continue
            if name in starts:
                del entries[: bisect_left(entries, (starts[name], 0))]
            if len(entries) > 2 * len(self._alive) + SLACK:
                entries[:] = [entry for entry in entries if self._is_alive(entry)]
            self._take(entries, count, found)
        return list(found)

    def _take(self, entries: list[tuple[float, int, Item]], count: int, found: dict[Item, None]) -> None:
        position = 0
        while count and position < len(entries):
            entry = entries[position]
            if self._is_alive(entry):
                found[entry[2]] = None
                position += 1
                count -= 1
            else:
                del entries[position]

    def _is_alive(self, entry: tuple[float, int, Item]) -> bool:
        return self._alive.get(entry[2]) == entry[1]
