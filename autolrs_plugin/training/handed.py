"""What others hand a step that cannot be handed again: batches that a thread puts into a container, or a process sends.

Both are told from the code: from the names of variables and attributes right before a method's.
"""

import dis
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

from autolrs_plugin.training.slots import METHODS, SILENT, Slots

FILLING = frozenset(
    (
        *("append", "appendleft", "extend", "extendleft", "insert", "add", "update", "setdefault"),
        *("put", "put_nowait"),
    )
)
TAKING = frozenset(
    (
        *("get", "get_nowait", "recv", "recv_bytes", "recv_into"),
        *("read", "readline", "readlines", "readinto", "communicate"),
    )
)
"""Methods that put something into a container, and that take from what another process sends."""

_CHANNELS = {
    "multiprocessing.queues": ("Queue", "JoinableQueue", "SimpleQueue"),
    "multiprocessing.connection": ("Connection", "PipeConnection"),
    "multiprocessing.managers": ("AutoProxy[Queue]", "AutoProxy[JoinableQueue]"),
    "socket": ("socket",),
    "subprocess": ("Popen",),
}


ELSEWHERE = ("multiprocessing.", "socket", "subprocess")
"""Modules whose objects stand for what is in another process."""


def is_channel(value: Any) -> bool:
    """Tell whether something brings what other processes send."""
    return type(value).__name__ in _CHANNELS.get(type(value).__module__, ())


def containers_in(slots: Mapping[str, Slots]) -> dict[int, tuple[str, Any]]:
    """Return the containers that can be filled, with the path to each, by their ids."""
    found = {}
    for path, holding in slots.items():
        for name, value in holding.get().items():
            if isinstance(value, list | deque | dict | set):
                found[id(value)] = f"{path}.{name}".strip("."), value
    return found


def check_channels(channels: Mapping[str, Any], codes: Iterable[CodeType]) -> None:
    """See that no step takes what another process sends: nobody can put that back.

    Raises:
        RuntimeError: one does; the message names where from.
    """
    if not channels:
        return
    taken = {name for code in codes for name, method in calls_in(code) if method in TAKING}
    for path, channel in channels.items():
        # Popen is asked by its attributes.
        own = {"stdout", "stderr"} if type(channel).__name__ == "Popen" else set()
        if taken & {last_name(path), *own}:
            raise RuntimeError(
                f"{path} (a {type(channel).__name__}): brings what another process sends, and what a probe takes from "
                "it cannot be put back, so the run would differ from one without probes. Give what batches are drawn "
                "from as train_data= (a DataLoader with num_workers has processes of its own)."
            )


def filled_names(codes: Iterable[CodeType]) -> set[str]:
    """Return the names of what functions put something into."""
    return {name for code in codes for name, method in calls_in(code) if method in FILLING}


def last_name(path: str) -> str:
    """Return the name of the variable or the attribute that a path ends with."""
    return path.rstrip("'").rpartition(".")[2]


@lru_cache(maxsize=4096)
def calls_in(code: CodeType) -> tuple[tuple[str, str], ...]:
    """Return the methods that code uses, each with the name before it; where an item is set, one of FILLING."""
    found: list[tuple[str, str]] = []
    seen = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname not in SILENT]
    for index, (operation, name) in enumerate(seen):
        if operation in METHODS and index and isinstance(seen[index - 1][1], str):
            found.append((seen[index - 1][1], name))
        if operation in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            # The key comes last, of one or two instructions.
            found += [
                (text, "update") for _, text in seen[max(0, index - 3) : index - 1] if isinstance(text, str)
            ]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += calls_in(constant)
    return tuple(found)


@lru_cache(maxsize=4096)
def loads_in(code: CodeType) -> frozenset[str]:
    """Return the names of what code looks at: not of what it only sets."""
    found = {
        i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_") and type(i.argval) is str
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= loads_in(constant)
    return frozenset(found)
