"""Plain values: numbers, strings, tensors and containers of these alone. They can be copied and put back."""

import ast
import itertools
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID

import numpy as np
import torch

ATOMS = (
    *(bool, int, float, complex, str, bytes, type(None), range, slice),
    *(np.number, np.bool_, np.character, np.datetime64, np.dtype),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Values that never change by themselves: what holds them is rebound."""

ALWAYS = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""The types of nearly all of them: looked up at once."""

RECORDED = (*ATOMS, PurePath, date, time, timedelta, Decimal, Enum)
"""What the entries of a log are: values that never change by themselves, though not all of them go into a file."""

OF_MEMBERS = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))
"""What every member of an enumeration has."""

FIXED = {
    *(date, datetime, time, timedelta, Decimal, Fraction, UUID),
    *(PurePosixPath, PureWindowsPath, PosixPath, WindowsPath),
}
"""Types whose objects never change by themselves, and are made again from a text."""

BUFFERS = (bytearray, array)
"""Bytes and numbers that change in place."""

OF_NUMPY = "biufcVSUmM"
"""The kinds of numpy's types whose values lie in the array: numbers, records, texts and times, and no objects."""

CONTAINERS = (dict, list, tuple, set, frozenset, deque)

MANY = 10_000
"""A container with more items than this is data, or a log: only what is added to it is taken back."""

MOST_MEMBERS = 1_000_000
"""What was in a longer container is not put back there."""

MOST_BYTES = {"module": float("inf"), "optimizer": float("inf"), "user": 64 * 2**20, "data": 2**20}
"""What is larger is data: it is watched, not copied."""


@dataclass(frozen=True, slots=True)
class Count:
    """Where an itertools.count is: what it gives next, and the step to the one after."""

    start: int | float | complex
    step: int | float | complex


def count_at(value: Any) -> Count | None:
    """Return where an itertools.count is; None of anything else, and of one whose numbers are not Python's own."""
    if type(value) is not itertools.count:
        return None
    try:
        start, *step = ast.literal_eval(f"({repr(value).removeprefix('count(')[:-1]},)")
    except ValueError:
        return None
    return Count(start, *step or [1])


def class_at(module: str, name: str) -> Any:
    """Return the class of a name in a module that is there already; None where there is none."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def is_fixed(value: Any) -> bool:
    """Tell whether a value is of the FIXED types, or a member of an enumeration that can be found by its name."""
    if not isinstance(value, Enum):
        return type(value) in FIXED
    kind = type(value)
    return class_at(kind.__module__, kind.__qualname__) is kind


def bears(value: Any) -> bool:
    """Tell whether a tensor, an array or a container has attributes that somebody has given it, beside its content."""
    if type(value) in _BARE or isinstance(value, np.memmap):
        return False
    if isinstance(value, torch.Tensor) and (
        hasattr(value, "to_local") or hasattr(value, "__tensor_flatten__")
    ):  # it consists of what is in them
        return False
    return bool(attributes_of(value))


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return the dictionary of an object's attributes, and an empty one where it has none.

    A `__getattr__` of its class is not asked: of a configuration it may raise KeyError, or have an answer for any name.
    """
    kind: Any = type(thing)
    try:
        return kind.__getattribute__(thing, "__dict__")  # type: ignore[no-any-return]
    except AttributeError:
        return {}


_BARE = {dict, list, tuple, set, frozenset, deque, np.ndarray}


def is_plain(
    value: Any,
    foreign: Container[int] = (),
    most_bytes: float = float("inf"),
    left: list[float] | None = None,
) -> bool:
    """Tell whether a value is made of numbers, strings, tensors and containers alone, and is not too large.

    Args:
        value: the value.
        foreign: ids of what belongs to somebody else, such as the parameters of the model.
        most_bytes: how large its tensors may be in all.
        left: how many items, and how many bytes, may still be looked at.
    """
    if type(value) in ALWAYS:
        if left is not None:
            left[0] -= 1
        return True
    inside = left is not None
    left = [MANY, most_bytes] if left is None else left
    left[0] -= 1
    if isinstance(value, ATOMS) or count_at(value) is not None:
        return True
    if is_fixed(value):  # in a container, a member with attributes needs to be walked to
        return not (inside and isinstance(value, Enum) and attributes_of(value).keys() - OF_MEMBERS)
    if isinstance(value, BUFFERS):
        left[1] -= memoryview(value).nbytes
        return left[1] >= 0
    if isinstance(value, torch.Tensor | np.ndarray):
        # In a container, one with attributes needs to be walked to; otherwise they are its own slots.
        if not is_dense(value) or (inside and bears(value)):
            return False
        left[1] -= value.nbytes
        # Without the names of the model's parameters, any parameter may be one of them.
        other = not isinstance(value, torch.nn.Parameter) or foreign != ()
        return left[1] >= 0 and other and id(value) not in foreign
    if not isinstance(value, CONTAINERS) or len(value) > left[0] or bears(value) or id(value) in foreign:
        return False
    if isinstance(value, dict) and not all(is_plain(k, foreign, most_bytes, left) for k in list(value)):
        return False
    inner = contents(value)
    if isinstance(value, set | frozenset) and any(isinstance(v, torch.Tensor) or count_at(v) for v in inner):
        return False  # one cannot be put in the place of another there
    return all(is_plain(v, foreign, most_bytes, left) for v in inner)


def contents(container: Any) -> list[Any]:
    """Return what a container holds at this moment, without the keys.

    Another thread may fill the container meanwhile, and Python does not go through one that changes: the list is made
    in one call that no thread comes between.
    """
    return list(container.values() if isinstance(container, dict) else container)


def entries(container: Any) -> list[tuple[Any, Any]]:
    """Return what a container holds at this moment, each item with its key or its index (see `contents`)."""
    return list(container.items() if isinstance(container, dict) else enumerate(list(container)))


def is_dense(value: Any) -> bool:
    """Tell whether a tensor or array is numbers in memory: not sparse, nested or on the meta device, and no objects."""
    if isinstance(value, torch.Tensor):
        return value.layout is torch.strided and not value.is_meta and not value.is_nested
    return bool(value.dtype.kind in OF_NUMPY and not value.dtype.hasobject)


def is_data(value: Any, left: list[int] | None = None) -> bool:
    """Tell whether a container is of plain values alone, as far as the first `left` of them tell."""
    left = [MANY] if left is None else left
    left[0] -= 1
    if isinstance(value, (*CONTAINERS, torch.Tensor, np.ndarray)) and bears(value):
        return False
    if isinstance(value, CONTAINERS) and not isinstance(value, torch.Size):
        items = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return all(is_data(item, left) for item in items if left[0] >= 0)
    return is_plain(value)


def is_log(value: Any, left: list[int] | None = None) -> bool:
    """Tell whether a value is a list of numbers, strings, paths or times alone: what happened, and how often."""
    return type(value) is list and _is_record(value, [MANY] if left is None else left)


def has_grown(before: Any, now: Any) -> bool:
    """Tell whether a value was a log and still is: nothing of it has changed, and more may have come to it."""
    return is_log(before) and is_log(now) and len(now) >= len(before) and now[: len(before)] == before


def _is_record(value: Any, left: list[int]) -> bool:
    left[0] -= 1
    if isinstance(value, RECORDED) or left[0] < 0:
        return True
    return isinstance(value, CONTAINERS) and all(_is_record(v, left) for v in contents(value))


def joined(path: str, name: str) -> str:
    """Return the path to an attribute."""
    return f"{path}.{name}" if path and name else path or name


def shortened(path: str) -> str:
    """Return a path, or where it is long what stands for it: as long a chain of objects has longer ones each time."""
    return path if len(path) < LONG else f"{path[: LONG // 4]}...{zlib.crc32(path.encode())}"


LONG = 400
"""Characters of a path from which on a number stands for its end."""
