"""Locks and flags that threads and processes set for each other: nobody can tell who has set one."""

import re
import threading
from collections.abc import Mapping
from typing import Any

from autolrs_plugin.training.slots import Slots

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
LOCKS: tuple[Any, ...] = (_LOCK, _RLOCK)

FLAGS: tuple[Any, ...] = (threading.Event, *LOCKS)

_OF_PROCESSES = ("Event", "Semaphore", "BoundedSemaphore", "Barrier")

FLAG = ", a flag)"
"""Ends the names of flags."""

PATIENCE_S = 0.05
"""A lock that another thread holds for longer is held."""


def is_shared_flag(value: Any) -> bool:
    """Tell whether something is a flag among processes."""
    kind = type(value)
    return kind.__module__ == "multiprocessing.synchronize" and kind.__name__ in _OF_PROCESSES


class LockSlots(Slots):
    """How often a lock is held, as long as there is one thread alone: otherwise nobody can tell who holds it."""

    NAME = "held"

    def get(self) -> dict[str, Any]:
        """Return the count."""
        return {self.NAME: times_held(self._owner)} if threading.active_count() == 1 else {}

    def set(self, name: str, value: Any) -> None:
        """Take or release the lock until the count is that."""
        if threading.active_count() > 1:
            return
        now = times_held(self._owner)
        for _ in range(value - now):
            self._owner.acquire(blocking=False)
        for _ in range(now - value):
            self._owner.release()

    def delete(self, name: str) -> None:
        """Leave it: it is always held so often."""


def times_held(lock: Any) -> int:
    """Return how often a lock is held: once at the most, unless the one that holds it may take it again."""
    if isinstance(lock, _LOCK):
        return int(lock.locked())
    found = re.search(r"count=(\d+)", repr(lock))
    assert found is not None, "a lock says how often it is held"
    return int(found.group(1))


def flags_seen(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return how flags stand, by the path and kind of each."""
    return {f"{path} ({type(flag).__name__}{FLAG}": str(_stands(flag)) for path, flag in flags.items()}


def _stands(flag: Any) -> Any:
    if isinstance(flag, _LOCK):
        if not flag.locked() or threading.active_count() == 1:
            return flag.locked()
        if held := not flag.acquire(timeout=PATIENCE_S):
            return held
        flag.release()  # it was somebody's for a moment
        return False
    if isinstance(flag, _RLOCK):
        return times_held(flag)
    if hasattr(flag, "is_set"):
        return flag.is_set()
    return flag.get_value() if hasattr(flag, "get_value") else (flag._state, flag._count)
