"""Which objects are where: what steps have put in another place cannot go into a file, but where it was at first can.

In memory the objects themselves are put back. A file says of each that is elsewhere now where it was when the job was
made, and another process, which has made it there, puts it in its place. Of an object that is new, its content goes by
where it is, into a copy of what is there in the other process, for that may be somebody else's as well.
"""

import copy
import functools
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary, ref

import numpy as np
import torch

from autolrs_plugin.training.checking import named
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.items import ItemSlots
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.plain import (
    ATOMS,
    BUFFERS,
    CONTAINERS,
    MANY,
    entries,
    is_dense,
    is_fixed,
    is_plain,
    joined,
)
from autolrs_plugin.training.resuming import shown
from autolrs_plugin.training.slots import ClassSlots, ContextSlots, FunctionSlots, Slots, VariableSlots

HELD, OWNER, METHOD, NEW, OTHER, GONE = "held", "owner", "method", "new", "other", "gone"
"""What a file says of an object: where it was held or reached, of which it is a method, that it is new, or nowhere; and
of a name at which nothing is held any more."""

_CALLED = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)

_HOLDING = {Slots, ItemSlots, VariableSlots, FunctionSlots, ClassSlots, ContextSlots}
"""Slots that hold the very objects, and no copies of what is in them."""

Told = dict[str, dict[str, list[Any]]]
"""By path and name, one of the above and what belongs to it."""


class References:
    """What a job held when it was made, to say of what it holds later.

    Args:
        found: the inventory then.
    """

    def __init__(self, found: Inventory) -> None:
        self._first: dict[tuple[str, str], Any] = {}
        self._places: dict[int, tuple[Any, list[Any]]] = {}
        self._owners: dict[int, tuple[Any, str]] = {}
        self._counts: Counter[int] = Counter()
        self._classes: dict[str, type] = {}
        self._walked: dict[int, tuple[Any, str]] = {}
        self._there: dict[str, Any] = {}
        self._sets = {path: [_held_weakly(m) for m in owner] for path, owner in _sets_in(found)}
        for path, slots in _referring(found):
            owner, held = slots.owner, _held_weakly(slots.owner)
            self._classes[path], self._there[path], self._walked[id(owner)] = type(owner), held, (held, path)
            if type(slots) is Slots:
                self._owners[id(owner)] = held, path
            for name, value in slots.get().items():
                self._first[path, name] = _held_weakly(value)
                for thing, keys in _within(value):
                    self._counts[id(thing)] += 1
                    self._places.setdefault(id(thing), (_held_weakly(thing), [path, name, *keys]))

    def told(self, found: Inventory) -> Told:
        """Return what a file has to say of what is elsewhere now, or new."""
        told: Told = {}
        views, stay = [], set()
        held: dict[str, Container[str]] = {}
        for path, slots in _referring(found):
            now, moved = slots.get(), self.moved(path, slots)
            if not moved:
                held[path] = now
            if (kind := self._classes.get(path)) not in (None, type(slots.owner)) and not moved:
                told[path] = {"class": [OTHER, f"{named(slots.owner)}, and was one of {kind.__name__}"]}
            for name, value in now.items():
                before = self._first.get((path, name), lambda: None)()
                if value is not before and (said := self._said(value, before)) is not None:
                    told.setdefault(path, {})[name] = said
                elif isinstance(value, torch.Tensor) and is_dense(value):
                    memory = value.untyped_storage().data_ptr()
                    stay.add(memory) if value is before else views.append((path, name, memory))
        for path, names in self._gone(held).items():
            told.setdefault(path, {}).update({name: [GONE] for name in names})
        for path, owner in _sets_in(found):
            before = {id(member) for held in self._sets.get(path, ()) if (member := held()) is not None}
            if path in self._sets and before != set(map(id, owner)):
                told.setdefault(path, {})["members"] = [OTHER, "a set of other objects than at first"]
        for path, name, memory in views:
            if memory in stay:
                told.setdefault(path, {})[name] = [OTHER, "a tensor in the memory of another one"]
        return told

    def moved(self, path: str, slots: Slots) -> bool:
        """Tell whether what is at a path now is another object than then, with what it holds."""
        if type(slots) not in (Slots, ItemSlots) or path not in self._there:
            return False
        return self._there[path]() is not slots.owner

    def _gone(self, held: Mapping[str, Container[str]]) -> dict[str, list[str]]:
        """Return the names at which something was held then, and nothing is now; `held` are those of now, by path."""
        gone: dict[str, list[str]] = {}
        for path, name in self._first:
            if path in held and name not in held[path]:
                gone.setdefault(path, []).append(name)
        return gone

    def know(self, found: Inventory, path: str) -> bool:
        """Tell whether what is at a path now was somewhere else then."""
        slots = found.slots.get(path)
        return slots is not None and self._known(self._walked, slots.owner) is not None

    def put_back(self, told: Mapping[str, Mapping[str, list[Any]]], found: Inventory) -> None:
        """Put the objects of this process where `told` says that they were in another.

        Raises:
            ValueError: there was one that nobody has here; the message names it.
        """
        if lost := lost_in(told):
            raise ValueError(
                f"run_dir: holds a state in which steps had put {shown(lost)}, which is not in this process, and a "
                "resume cannot create it: begin a new run, and hold all that a step chooses among before AutoLRS "
                "is made there."
            )
        first = {(path, name) for path, name in self._first if path in found.slots}
        held = {path: found.slots[path].get() for path in dict.fromkeys(path for path, _ in first)}
        for path, name in dict.fromkeys([*first, *((p, n) for p, names in told.items() for n in names)]):
            kind, *place = told.get(path, {}).get(name, [HELD, path, name])
            slots, now = found.slots.get(path), held.get(path, {}).get(name)
            if slots is None or kind == GONE or (kind == NEW and now is None):
                continue
            thing = _copied(now) if kind == NEW else self._at(kind, place)
            if thing is not None and thing is not now:
                slots.set(name, thing)
        for path, names in told.items():
            # From the end of a list on.
            for name in reversed([name for name, (kind, *_) in names.items() if kind == GONE]):
                if path in found.slots and name in found.slots[path].get():
                    found.slots[path].delete(name)

    def _said(self, value: Any, before: Any) -> list[Any] | None:
        if isinstance(value, ATOMS) or is_fixed(value):
            return None
        place = self._known(self._places, value)
        if place is not None:
            return [HELD, *place]
        if (owner := self._known(self._owners, value)) is not None:
            return [OWNER, owner]
        if isinstance(value, MethodType) and isinstance(value.__func__, FunctionType):
            owner = self._known(self._owners, value.__self__)
            return [OTHER, named(value)] if owner is None else [METHOD, owner, value.__name__]
        if before is None or isinstance(before, ATOMS) or is_fixed(before):
            return None  # what was not there has no content here, and steps make it anew; see `resuming`
        if type(value) is type(before) and not isinstance(value, (*_CALLED, type)):
            shared = is_users(type(value)) or self._counts[id(before)] > 1
            return [NEW] if shared and not isinstance(value, torch.nn.Module) else None
        code = getattr(value, "__code__", None)
        if code is not None and code is getattr(before, "__code__", None):
            return None
        modules = [str(getattr(thing, "__module__", "")) for thing in (before, value)]
        if is_plain(value) or any(module.startswith("autolrs_plugin.") for module in modules):
            return None
        return [OTHER, f"{named(value)} in the place of {named(before)}"]

    def _at(self, kind: str, place: list[Any]) -> Any:
        if kind in (OWNER, METHOD):
            path, *names = place
            owner = next((held() for held, at in self._owners.values() if at == path), None)
            return getattr(owner, names[0]) if names else owner
        path, name, *keys = place
        thing = self._first[path, name]()
        for key in keys:
            thing = thing[key]
        return thing

    def _known(self, places: Mapping[int, tuple[Any, Any]], value: Any) -> Any:
        held, place = places.get(id(value), (None, None))
        return place if held is not None and held() is value else None


def lost_in(told: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, str]:
    """Return what no other process has: what it is, by the path to it."""
    return {
        joined(p, n): said[1] for p, names in told.items() for n, said in names.items() if said[0] == OTHER
    }


def orders_of(found: Inventory) -> dict[str, list[str]]:
    """Return the names of the items of each dictionary that is walked to, in their order; of such with plain keys."""
    names = {
        path: list(slots.get())
        for path, slots in found.lasting().items()
        if isinstance(slots, ItemSlots) and isinstance(slots.owner, dict | WeakValueDictionary)
    }
    return {path: order for path, order in names.items() if not any(n.startswith("[#") for n in order)}


def _referring(found: Inventory) -> Iterator[tuple[str, Slots]]:
    for path, slots in found.lasting().items():
        if slots.kind in ("user", "data", "module") and type(slots) in _HOLDING:
            yield path, slots


def _sets_in(found: Inventory) -> Iterator[tuple[str, Any]]:
    """Yield the sets of objects that are walked to."""
    for path, slots in found.slots.items():
        if type(slots) is ItemSlots and isinstance(slots.owner, set):
            yield path, slots.owner


def _within(value: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a value that is no atom, and those inside of a plain one, with the keys to them."""
    if isinstance(value, ATOMS) or is_fixed(value):
        return
    yield value, []
    if isinstance(value, list | tuple | dict) and len(value) <= MANY and is_plain(value):
        for key, item in entries(value):
            if isinstance(item, (*CONTAINERS, *BUFFERS, torch.Tensor, np.ndarray)) and isinstance(
                key, int | str
            ):
                yield item, [key]


def _held_weakly(value: Any) -> Any:
    """Return what gives a value as long as it lives.

    What cannot be held so lives on, if it is a container, or has attributes; others, such as iterators, do not.
    """
    try:
        return ref(value)
    except TypeError:
        lives = isinstance(value, (*CONTAINERS, SimpleNamespace)) or is_users(type(value))
        kept = value if lives else None
        return lambda: kept


def _copied(value: Any) -> Any:
    """Return another object with the same content."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.copy(value)
