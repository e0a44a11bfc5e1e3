"""What of objects is no value that they hold: their class, the order of their items, the memory of a tensor."""

import ctypes
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from autolrs_plugin.training.holdings import Origins
from autolrs_plugin.training.items import ItemSlots
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.lost import ORDER, POPPED
from autolrs_plugin.training.plain import MANY, entries, is_dense, is_plain, joined
from autolrs_plugin.training.slots import Slots
from autolrs_plugin.training.tree import is_sharded, part_names


def forms(places: Mapping[str, Slots]) -> dict[str, str]:
    """Return a text of each form that a step may change, by the path to it."""
    found: dict[str, str] = {}
    for path, slots in places.items():
        if type(slots) is Slots and is_users(kind := type(slots.owner)):
            found[f"{path} (its class)"] = f"{kind.__module__}.{kind.__qualname__}"
        if _is_ordered(slots):
            found[f"{path} (the order of its items)"] = _digest(list(slots.get()))
        values = {"": slots.owner} if isinstance(slots.owner, set) else slots.get()
        for name, value in values.items():
            for where, members in _sets_in(joined(path, name), value):
                found[where + POPPED] = str(_finger_of(members))
                found[where + ORDER] = _digest([_member(item) for item in members])
    return found


def hold_forms(origins: Origins) -> None:
    """Note the classes of objects, the orders of items, and where the memory of tensors is."""
    found = origins.found
    origins.classes = [(s.owner, type(s.owner)) for s in found.slots.values() if type(s) is Slots]
    origins.orders = {path: list(slots.get()) for path, slots in found.slots.items() if _is_ordered(slots)}
    buffers = [buffer for module in found.modules.values() for buffer in module._buffers.values()]
    noted = [value for value in origins.notes.values() if isinstance(value, torch.Tensor)]
    tensors = {id(t): t for t in (*origins.parameters.values(), *buffers, *noted) if t is not None}
    origins.memory = [(tensor, tensor.detach()) for tensor in tensors.values() if _is_ordinary(tensor)]


def restore_forms(origins: Origins) -> None:
    """Make objects of the class again that was noted, and tensors of the memory: before values are written to them."""
    for owner, kind in origins.classes:
        if type(owner) is not kind:
            object.__setattr__(owner, "__class__", kind)
    for tensor, memory in origins.memory:
        if _layout(tensor) != _layout(memory):
            tensor.data = memory


def restore_orders(origins: Origins) -> None:
    """Put the items of dictionaries into the order that was noted: when the items are there."""
    for path, order in origins.orders.items():
        slots = origins.found.slots.get(path)
        if slots is not None and isinstance(slots, ItemSlots) and list(slots.get()) != order:
            slots.arrange(order)


_ORDERED = (dict, WeakKeyDictionary, WeakValueDictionary)


def _is_ordered(slots: Slots) -> bool:
    return isinstance(slots, ItemSlots) and isinstance(slots.owner, _ORDERED)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return is_dense(tensor) and not is_sharded(tensor) and not part_names(tensor)


def _layout(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _digest(items: list[Any]) -> str:
    return str(zlib.crc32(repr(items).encode(errors="replace")))


def _member(item: Any) -> Any:
    return item if is_plain(item) and not isinstance(item, torch.Tensor) else id(item)


def _sets_in(path: str, value: Any) -> Iterator[tuple[str, set[Any]]]:
    """Yield the sets that a value is, or has in it as plain values, with the paths to them."""
    if isinstance(value, set):
        yield path, value
    elif isinstance(value, dict | list | tuple | deque) and len(value) <= MANY:
        for key, item in entries(value):
            if isinstance(item, set | dict | list | tuple | deque):
                yield from _sets_in(f"{path}[{key!r}]", item)


_FINGER = object.__basicsize__ + 5 * ctypes.sizeof(ctypes.c_ssize_t)
"""Where CPython has the place at which a set's pop() goes on; nothing else tells of it."""


def _finger_of(members: set[Any]) -> int:
    """Return at which place in a set its pop() goes on."""
    return ctypes.c_ssize_t.from_address(id(members) + _FINGER).value if _TELLS else 0


def _tells() -> bool:
    if sys.implementation.name != "cpython":  # elsewhere an id is no address
        return False
    members = set(range(6))
    before = ctypes.c_ssize_t.from_address(id(members) + _FINGER).value
    for _ in range(3):
        members.pop()
    return before == 0 and ctypes.c_ssize_t.from_address(id(members) + _FINGER).value == 3


_TELLS = _tells()
