"""State in plain attributes and variables: of modules, optimizers, data sets, a user's own objects and functions."""

import dis
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

from autolrs_plugin.training.tree import Copier, Restorer

ATOMS = (
    *(bool, int, float, complex, str, bytes, type(None), range, slice, np.generic),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Values that never change by themselves: what holds them is rebound."""

MANY = 10_000
"""A container with more items than this is data, or a log: only what is added to it is taken back."""

MOST_BYTES = {"module": float("inf"), "optimizer": float("inf"), "user": 64 * 2**20, "data": 2**20}
"""What is larger is data: it is watched, not copied."""

_TORCHS = frozenset(vars(torch.nn.Module()))
_OPTIMIZERS = frozenset({"param_groups", "state", "defaults"})


def is_plain(
    value: Any,
    foreign: Container[int] = (),
    most_bytes: float = float("inf"),
    left: list[float] | None = None,
) -> bool:
    """Tell whether a value is made of numbers, strings, tensors and containers alone, and is not too large.

    Args:
        value: the value.
        foreign: ids of tensors that belong to somebody else, such as the parameters of the model.
        most_bytes: how large its tensors may be in all.
        left: how many items, and how many bytes, may still be looked at.
    """
    left = [MANY, most_bytes] if left is None else left
    left[0] -= 1
    if isinstance(value, ATOMS):
        return True
    if isinstance(value, torch.Tensor | np.ndarray):
        left[1] -= value.nbytes
        numbers = isinstance(value, torch.Tensor) or value.dtype.kind in "biufc"
        return (
            numbers
            and left[1] >= 0
            and not isinstance(value, torch.nn.Parameter)
            and id(value) not in foreign
        )
    if not isinstance(value, dict | list | tuple | set | frozenset | deque) or len(value) > left[0]:
        return False
    if isinstance(value, dict) and not all(is_plain(k, foreign, most_bytes, left) for k in value):
        return False
    return all(
        is_plain(v, foreign, most_bytes, left) for v in (value.values() if isinstance(value, dict) else value)
    )


def is_record(value: Any, left: list[int] | None = None) -> bool:
    """Tell whether a value holds numbers and strings alone: a count, or a log."""
    left = [MANY] if left is None else left
    left[0] -= 1
    if isinstance(value, ATOMS) or left[0] < 0:
        return True
    if isinstance(value, dict):
        return all(is_record(v, left) for v in value.values())
    return isinstance(value, list | tuple | set | frozenset | deque) and all(
        is_record(v, left) for v in value
    )


class Slots:
    """What an object holds by name, to be read and set.

    Attributes:
        kind: `module`, `optimizer`, `data` (data sets, samplers, collators) or `user` (a user's own objects).
    """

    def __init__(self, owner: Any, kind: str, leave: Container[str] = ()) -> None:
        self._owner = owner
        self.kind = kind
        self._leave = leave

    def get(self) -> dict[str, Any]:
        """Return what is held now, by name."""
        return {k: v for k, v in held(self._owner).items() if not self._is_torchs(k) and k not in self._leave}

    def set(self, name: str, value: Any) -> None:
        """Hold another object."""
        object.__setattr__(self._owner, name, value) if self.kind == "user" else setattr(
            self._owner, name, value
        )

    def delete(self, name: str) -> None:
        """Hold nothing there."""
        delattr(self._owner, name)

    def _is_torchs(self, name: str) -> bool:
        if isinstance(self._owner, torch.nn.Module):
            return name in _TORCHS
        if isinstance(self._owner, torch.optim.Optimizer):
            return name in _OPTIMIZERS or name.endswith("_hooks")
        return isinstance(self._owner, torch.utils.data.DataLoader)


class WrapperSlots(Slots):
    """What of DistributedDataParallel's own attributes decides about a later step: whether buffers are sent before it.

    An evaluation turns it off, until a step has been taken; after one that is taken back, the next step would miss it.
    """

    NAME = "require_forward_param_sync"

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, "module")

    def get(self) -> dict[str, Any]:
        """Return the one attribute, where there is one."""
        return {self.NAME: getattr(self._owner, self.NAME)} if hasattr(self._owner, self.NAME) else {}


class FunctionSlots(Slots):
    """The variables of a function's surroundings that it uses: closure cells and globals.

    Those that hold numbers alone are the user's own counts and logs of what the function did: they stay.
    """

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function, "user")
        names, stored = names_in(function.__code__)
        self._stored = stored
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._cells = dict(cells)
        self._globals = function.__globals__
        self._names = [name for name in names if name in self._globals]

    def get(self) -> dict[str, Any]:
        """Return the variables that can change: those that the function sets, and what can be changed in place."""
        found = {name: self._globals[name] for name in self._names if name in self._globals}
        for name, cell in self._cells.items():
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not set yet
                continue
        return {k: v for k, v in found.items() if k in self._stored or not isinstance(v, ATOMS)}

    def set(self, name: str, value: Any) -> None:
        """Set a variable."""
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            self._globals[name] = value

    def delete(self, name: str) -> None:
        """Leave it: a function's variables stay."""


def held(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    slots = [n for kind in type(owner).__mro__ for n in _names(vars(kind).get("__slots__", ()))]
    found = {
        n: getattr(owner, n) for n in slots if n not in ("__dict__", "__weakref__") and hasattr(owner, n)
    }
    return {**found, **getattr(owner, "__dict__", {})}


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names that a function's code uses (globals and attributes), and those that it sets."""
    names = dict.fromkeys(code.co_names)
    stores = ("STORE_GLOBAL", "STORE_DEREF")
    stored = {i.argval for i in dis.get_instructions(code) if i.opname in stores}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, set_there = names_in(constant)
            names.update(dict.fromkeys(inner))
            stored |= set_there
    return tuple(names), frozenset(stored)


def _names(slots: str | Sequence[str]) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


class PlainAttributes:
    """The plain attributes of an object (counters, sums, lists of metrics), as something that can be rolled back.

    Args:
        owner: the object.
        leave: names of attributes that are data, or otherwise not the object's state.
    """

    def __init__(self, owner: Any, leave: Sequence[str] = ()) -> None:
        self._slots = Slots(owner, "data", leave)

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {k: v for k, v in self._slots.get().items() if is_plain(v)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the attributes, and delete those that are new."""
        for name in self.state_dict().keys() - state.keys():
            self._slots.delete(name)
        for name, value in state.items():
            self._slots.set(name, value)


@contextmanager
def kept(*things: PlainAttributes) -> Iterator[None]:
    """Whatever happens inside, the state of `things` is afterwards what it was before."""
    copier = Copier()
    states = [copier.copy(thing.state_dict(), note=True) for thing in things]
    try:
        yield
    finally:
        with torch.no_grad():
            for thing, state in zip(things, states, strict=True):
                thing.load_state_dict(Restorer(copier.origins).restored(None, state))
