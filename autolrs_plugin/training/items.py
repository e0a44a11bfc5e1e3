"""What is in containers, caches, memory and bars, as slots."""

import ast
import contextlib
import gc
import io
import os
import queue
import re
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Executor, Future
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    GetSetDescriptorType,
    ModuleType,
    TracebackType,
)
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

import numpy as np
import torch

from autolrs_plugin.training.flags import LOCKS, LockSlots
from autolrs_plugin.training.plain import ATOMS, MOST_BYTES, MOST_MEMBERS, attributes_of, entries, is_plain
from autolrs_plugin.training.slots import NumberSlots, Slots, held


class ItemSlots(Slots):
    """The items of a container, as `[index]` or `['key']`: of one that holds other things than plain values, too.

    Keys that are no plain values go by their place, and so do the members of sets; they are held as they are.
    """

    def __init__(self, owner: Any, kind: str = "user") -> None:
        super().__init__(owner, kind)
        self._keys: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self.lasts = self.lasts and isinstance(owner, Sequence | deque | Mapping | np.ndarray)
        if not isinstance(owner, Sequence | deque | np.ndarray):
            self.get()  # which takes note of the keys

    def get(self) -> dict[str, Any]:
        """Return the items."""
        if isinstance(self._owner, Sequence | deque):
            return {f"[{i}]": item for i, item in entries(self._owner)}
        if isinstance(self._owner, np.ndarray):
            return {f"[{i}]": item for i, item in enumerate(self._owner.flat)}
        if isinstance(self._owner, Mapping):
            return {self._name(key): item for key, item in list(self._owner.items())}
        return {self._name(item): item for item in list(self._owner)}

    def set(self, name: str, value: Any) -> None:
        """Put an item there."""
        if isinstance(self._owner, list | deque):
            index = int(name[1:-1])
            self._owner.extend([None] * (index + 1 - len(self._owner)))
            self._owner[index] = value
        elif isinstance(self._owner, np.ndarray):
            self._owner.flat[int(name[1:-1])] = value
        elif isinstance(self._owner, dict):
            kind = OrderedDict if isinstance(self._owner, OrderedDict) else dict
            kind.__setitem__(self._owner, self._key(name), value)  # a class of the user's may do more
        elif isinstance(self._owner, Mapping):
            self._owner[self._key(name)] = value  # type: ignore[index]
        elif not isinstance(self._owner, tuple | frozenset):
            self._owner.add(value)

    def delete(self, name: str) -> None:
        """Take an item away; of a list, one that was added at its end."""
        if isinstance(self._owner, list | deque):
            self._owner.pop()
        elif isinstance(self._owner, Mapping):
            del self._owner[self._key(name)]  # type: ignore[attr-defined]
        else:
            self._owner.discard(self._key(name))

    def arrange(self, names: Sequence[str]) -> None:
        """Put the items of a dictionary into the order of their names; those without one come first."""
        owner: Any = self._owner
        for key in [key for name in names if (key := self._key(name)) in owner]:
            # Not methods of a class of the user's, which may do more.
            if isinstance(owner, OrderedDict):
                OrderedDict.move_to_end(owner, key)
            elif isinstance(owner, dict):
                dict.__setitem__(owner, key, dict.pop(owner, key))
            else:
                owner[key] = owner.pop(key)

    def _key(self, name: str) -> Any:
        if name not in self._keys and name.startswith("[#"):
            raise ValueError(
                f"{name}: an item of a {type(self._owner).__name__} is held under a key that only the earlier process "
                "knew, so this run cannot be resumed; make it before training begins, or leave run_dir out."
            )
        known = self._keys[name] if name in self._keys else ast.literal_eval(name[1:-1])
        return known() if isinstance(known, ref) else known

    def _name(self, key: Any) -> str:
        if isinstance(key, ATOMS) and isinstance(self._owner, Mapping):
            self._keys.setdefault(f"[{key!r}]", key)
            return f"[{key!r}]"
        known = self._names.get(id(key))
        if known is not None and self._key(known) is key:  # another may have the id of one that is gone
            return known
        name = self._names[id(key)] = f"[#{len(self._keys)}]"
        weak = isinstance(self._owner, WeakKeyDictionary | WeakSet)
        self._keys[name] = ref(key) if weak else key
        return name


class Members:
    """What a container held at one time."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __deepcopy__(self, memo: dict[int, Any]) -> "Members":
        return self


class MemberSlots(Slots):
    """Which objects are in a long list, deque, dictionary or set: they are put back there, as they are.

    What is in the objects is watched. Into a file go plain values alone, of `plain.MOST_MEMBERS` and of
    `plain.MOST_BYTES` at the most.

    Args:
        owner: the container.
        grows: whether it is a log, which stays where it has only grown.
    """

    NAME = "members"

    def __init__(self, owner: Any, grows: bool = False) -> None:
        super().__init__(owner, "user")
        self._grows = grows

    def get(self) -> dict[str, Any]:
        """Return the members."""
        return {self.NAME: Members(self._members())}

    def set(self, name: str, value: Any) -> None:
        """Put members back: what `get` gave, or a list of them from a file."""
        kept: list[Any] = value.items if isinstance(value, Members) else value
        now = self._members()
        if self._grows and len(kept) <= len(now):
            now = now[: len(kept)]
        if len(now) == len(kept) and all(map(_is_same, now, kept)):
            return
        if isinstance(self._owner, list):
            self._owner[:] = kept
            return
        self._owner.clear()
        fill = self._owner.extend if isinstance(self._owner, deque) else self._owner.update
        fill(kept)

    def stored(self, names: Container[int]) -> dict[str, Any]:
        """Return the members as what goes into a file, which refuses what is not plain; `names` are the parameters'."""
        members = self._members()
        plain = is_plain(members, names, left=[MOST_MEMBERS, MOST_BYTES[self.kind]])
        return {self.NAME: members if plain else Members(members)}

    def _members(self) -> list[Any]:
        return list(self._owner.items() if isinstance(self._owner, dict) else self._owner)


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two members are one object, or two pairs hold the same ones."""
    pairs = type(one) is tuple and type(other) is tuple and len(one) == len(other)
    return one is other or (pairs and all(a is b for a, b in zip(one, other, strict=True)))


class EnvironmentSlots(ItemSlots):
    """The environment variables of this process."""

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.lasts = False


class InnerSlots(ItemSlots):
    """What an object of C refers to, but for its attributes: a view of a dictionary, and the like."""

    def __init__(self, owner: Any, kind: str) -> None:
        attributes = held(owner)
        known = {id(attributes_of(owner)), *map(id, attributes.values())}
        parts = [part for part in gc.get_referents(owner) if id(part) not in known]
        super().__init__(tuple(p for p in parts if not isinstance(p, (*ATOMS, *_NOT_INSIDE))), kind)


class FieldSlots(Slots):
    """The fields that a class of C shows by name: where they can be set, they are put back (the blocks of a table).

    What is made anew for each look is none of the object's own, and numbers may count what nobody sets.
    """

    def get(self) -> dict[str, Any]:
        """Return objects that the owner refers to, and switches."""
        own, found = set(map(id, gc.get_referents(self._owner))), {}
        for name, field in _fields(type(self._owner)).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that go out of use
                try:
                    value = field.__get__(self._owner)
                except Exception:  # nothing is known of what a field of any library raises
                    continue
            if value is None or isinstance(value, bool) or id(value) in own:
                found[name] = value
        return found

    def set(self, name: str, value: Any) -> None:
        """Set a field; one that cannot be set is seen to be another afterwards."""
        with contextlib.suppress(AttributeError, TypeError):
            _fields(type(self._owner))[name].__set__(self._owner, value)

    def delete(self, name: str) -> None:
        """Leave it: a field is always there."""


def _fields(kind: type) -> dict[str, Any]:
    """Return the descriptors of the fields that the classes of C among the bases of a class show by name."""
    return {
        name: member
        for base in reversed(kind.__mro__[:-1])
        for name, member in vars(base).items()
        if isinstance(member, GetSetDescriptorType) and name not in ("__dict__", "__weakref__")
    }


class BufferSlots(Slots):
    """The bytes of what shares its memory: a number of ctypes, a mapped file."""

    copies = True

    def get(self) -> dict[str, Any]:
        """Return the bytes."""
        return {"bytes": bytearray(self._memory())}

    def set(self, name: str, value: Any) -> None:
        """Write the bytes."""
        self._memory()[:] = value

    def delete(self, name: str) -> None:
        """Leave it: there are always bytes."""

    def _memory(self) -> memoryview:
        return memoryview(self._owner).cast("B")


class MemoryFileSlots(Slots):
    """What is in a file that lies in memory, and where the next read or write is."""

    def get(self) -> dict[str, Any]:
        """Return the content and the place; nothing of one that is closed."""
        if self._owner.closed:
            return {}
        return {"content": self._owner.getvalue(), "place": self._owner.tell()}

    def set(self, name: str, value: Any) -> None:
        """Write the content, or go to the place."""
        if name == "content":
            place = self._owner.tell()
            self._owner.seek(0)
            self._owner.truncate()
            self._owner.write(value)
            value = place
        self._owner.seek(value)

    def delete(self, name: str) -> None:
        """Leave it: what was closed cannot be closed again."""


class StorageSlots(Slots):
    """The bytes of a storage of torch's that no tensor may stand before."""

    def get(self) -> dict[str, Any]:
        """Return the bytes, as a tensor that shares them."""
        return {"bytes": torch.empty(0, dtype=torch.uint8, device=self._owner.device).set_(self._owner)}

    def set(self, name: str, value: Any) -> None:
        """Write the bytes."""
        if self._owner.nbytes() != value.nbytes:
            self._owner.resize_(value.nbytes)
        self.get()["bytes"].copy_(value)

    def delete(self, name: str) -> None:
        """Leave it: there are always bytes."""


class BarSlots(Slots):
    """How far a bar of tqdm or rich has come: a step may go by that."""

    def get(self) -> dict[str, Any]:
        """Return the counts, by the path to each."""
        return {name: vars(owner)[name.rpartition(".")[2]] for name, owner in self._counted().items()}

    def set(self, name: str, value: Any) -> None:
        """Set a count."""
        vars(self._counted()[name])[name.rpartition(".")[2]] = value

    def delete(self, name: str) -> None:
        """Leave it: a count of what was added since."""

    def _counted(self) -> dict[str, Any]:
        """Return what has each count."""
        tasks = vars(self._owner).get("_tasks", {})
        found = {f"tasks[{i}].{name}": task for i, task in tasks.items() for name in ("completed", "total")}
        own = [name for name in ("n", "last_print_n", "total") if name in vars(self._owner)]
        return found | dict.fromkeys(own, self._owner)


class RecordSlots(Slots):
    """A record of numpy's, which may share the memory of the array that it is of."""

    copies = True

    def get(self) -> dict[str, Any]:
        """Return the record, as an array of its own."""
        return {"record": np.array(self._owner)}

    def set(self, name: str, value: Any) -> None:
        """Write the fields."""
        for field in self._owner.dtype.names or ():
            self._owner[field] = value[field]

    def delete(self, name: str) -> None:
        """Leave it: a record is always there."""


_BARS = ("tqdm", "rich.progress")


def special_slots(value: Any, kind: str) -> Slots | None:
    """Return the slots of what holds a state that is no attribute of its own, or all of it that counts; else None."""
    if isinstance(value, io.BytesIO | io.StringIO):
        return MemoryFileSlots(value, kind)
    if isinstance(value, torch.UntypedStorage):
        return StorageSlots(value, kind)
    if isinstance(value, np.void) and not value.dtype.hasobject:
        return RecordSlots(value, kind)
    if isinstance(value, LOCKS):
        return LockSlots(value, kind)
    if isinstance(value, threading.Semaphore | threading.Barrier):
        return NumberSlots(value, kind)
    return BarSlots(value, kind) if type(value).__module__.startswith(_BARS) else None


class CacheSlots(ItemSlots):
    """What functools.cache or lru_cache has kept, by the place of its key: what was added can be taken away."""

    def __init__(self, function: Any) -> None:
        self._function = function
        super().__init__(_cache_in(function)[0])
        self.lasts = False

    def get(self) -> dict[str, Any]:
        """Return the function, under the name of each key."""
        return dict.fromkeys(super().get(), self._function)

    def set(self, name: str, value: Any) -> None:
        """Leave it: a result that was dropped is gone."""


class ResultSlots(ItemSlots):
    """The results that functools.cache or lru_cache has kept, which a step may change in place."""

    def __init__(self, function: Any) -> None:
        kept, others = _cache_in(function)
        super().__init__((*kept.values(), *others))
        self.lasts = False


def _cache_in(function: Any) -> tuple[dict[Any, Any], list[Any]]:
    """Return the dictionary of a cached function, and what else it refers to: with a maxsize, keys and results.

    Nothing but the garbage collector tells of it; where it does not, what is added shows in cache_info().
    """
    parts = [part for part in gc.get_referents(function) if part is not function.__dict__]
    # Results, which may be dictionaries, too, come before it.
    places = [i for i, part in enumerate(parts) if type(part) is dict]
    if not places:
        return {}, []
    return parts[places[-1]], parts[: places[-1]]


def buffer_of(value: Any) -> memoryview | None:
    """Return the memory of a value that shares it and lets others write to it; None of all others."""
    if type(value) in _UNSHARED:
        return None
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError) as error:
        if "a bytes-like object is required" in str(error):
            _UNSHARED.add(type(value))
        return None
    pointers = _POINTERS & set(re.sub(r":\w+:", "", view.format))  # without the names of fields
    return None if pointers or view.readonly or not view.c_contiguous or not view.nbytes else view


_UNSHARED: WeakSet[type] = WeakSet()
"""Types that are known to share no memory: nearly all, and asking costs more than all else about an object."""

_POINTERS = set("PzZOX&")
"""Formats of pointers: what they point to may be gone, so their bytes must not be put back."""


_NOT_INSIDE = (type, ModuleType, BaseException, FrameType, TracebackType, CodeType, BuiltinFunctionType)

WEAK = (WeakKeyDictionary, WeakValueDictionary, WeakSet)

SHARED = (queue.Queue, queue.SimpleQueue, threading.Semaphore, Future, Executor)
"""What threads hand things to each other with."""
