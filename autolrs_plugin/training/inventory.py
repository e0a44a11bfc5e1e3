"""What a training job consists of: one inventory, found by walking from its parts to all that they reach.

In the job and restored: every module (the model, a teacher beside it, a metric) with its buffers and attributes; every
optimizer, wherever another one or a container holds it; everything with state_dict() and load_state_dict(), such as LR
schedulers; every random number generator; plain attributes of data sets, samplers and collators; and, from the
functions that the job is given, the variables and the objects of the user's own that they use.

Not in it: what libraries keep for themselves (loggers, bars), and data. Data, frozen weights and iterators are watched.
"""

import functools
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinMethodType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from autolrs_plugin.training.attributes import (
    ATOMS,
    MANY,
    FunctionSlots,
    Slots,
    WrapperSlots,
    held,
    names_in,
)
from autolrs_plugin.training.rng import Generator, like_state

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

SKIPPED = {
    *(
        "autolrs_plugin",
        "logging",
        "threading",
        "multiprocessing",
        "concurrent",
        "asyncio",
        "io",
        "weakref",
        "types",
    ),
    *(
        "rich",
        "tqdm",
        "wandb",
        "tensorboard",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "ray",
        "pyarrow",
    ),
    *(
        "pytest",
        "_pytest",
        "unittest",
        "inspect",
        "socket",
        "subprocess",
        "pathlib",
        "enum",
        "re",
        "matplotlib",
    ),
}
"""Packages whose objects hold nothing of a job that is not reached in another way."""

TORCHS_OWN = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "torch.fx")
"""Wrappers whose attributes mirror objects that cannot be set back; for what of them matters see WrapperSlots."""

DEEP, REACH = 12, 100_000
"""How far the walk goes: attributes in a row, and objects in all."""

FEW = 100
"""A container of data with more items than this holds no state."""


class Stateful(Protocol):
    """Whatever keeps its state as torch's own objects do: schedulers, scalers, samplers, averages of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(thing: Any) -> bool:
    """Tell whether something keeps its state as torch's own objects do."""
    kind = type(thing)
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


class Inventory:
    """All that is reached from the parts of a job, by the path to it.

    Args:
        roots: the parts, by the path that is theirs; the model has none, so that its modules have their own names.
        skip: objects that somebody else takes care of.
        data: whether the parts are data.

    Attributes:
        modules: every module.
        optimizers: every optimizer with a state of its own.
        stateful: what has a state_dict() and is neither.
        generators: random number generators.
        slots: whose attributes and variables are state.
        iterators: what is drawn from and cannot be set back.
    """

    def __init__(self, roots: Mapping[str, Any], skip: Mapping[str, Any], data: bool = False) -> None:
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stateful: dict[str, Stateful] = {}
        self.generators: dict[str, Generator] = {}
        self.slots: dict[str, Slots] = {}
        self.iterators: dict[str, Iterator[Any]] = {}
        # Some of what is found is made while looking: it must outlive its id.
        self._seen: dict[int, Any] = {id(thing): thing for thing in skip.values()}
        self._states: set[int] = set()
        self._variables: set[tuple[int, str]] = set()
        for name, root in roots.items():
            self._visit(name, root, data)

    def _visit(self, path: str, value: Any, data: bool = False, depth: int = 0) -> None:
        passed = isinstance(value, (*ATOMS, torch.Tensor, np.ndarray, type, ModuleType))
        if passed or id(value) in self._seen or depth > DEEP or len(self._seen) > REACH:
            return
        self._seen[id(value)] = value
        if isinstance(value, GENERATORS):
            self.generators[path] = value
        elif isinstance(value, torch.nn.Module):
            self._module(path, value, depth)
        elif isinstance(value, torch.optim.Optimizer):
            self._optimizer(path, value, depth)
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            self._container(path, value, data, depth)
        elif isinstance(value, MethodType | FunctionType | functools.partial):
            self._function(path, value, data, depth)
        elif isinstance(value, DataLoader):
            for name in ("dataset", "sampler", "batch_sampler", "collate_fn", "generator"):
                self._visit(f"{path}.{name}", getattr(value, name, None), True, depth + 1)
        elif is_stateful(value) and not data:
            self.stateful[path] = value
        elif isinstance(value, Iterator) and not (is_users(type(value)) and hasattr(value, "__dict__")):
            self.iterators[path] = value
        else:
            self._instance(path, value, data, depth)

    def _module(self, path: str, root: torch.nn.Module, depth: int) -> None:
        for name, module in root.named_modules():
            if name and id(module) in self._seen:
                continue
            self._seen[id(module)] = module
            own = joined(path, name)
            self.modules[own] = module
            wraps = type(module).__module__.startswith(TORCHS_OWN)
            self._held(own, WrapperSlots(module) if wraps else Slots(module, "module"), False, depth)

    def _optimizer(self, path: str, optimizer: torch.optim.Optimizer, depth: int) -> None:
        if id(optimizer.state) not in self._states:  # Accelerate's optimizer has that of the one inside
            self._states.add(id(optimizer.state))
            self.optimizers[path] = optimizer
        self._held(path, Slots(optimizer, "optimizer"), False, depth)

    def _container(self, path: str, value: Any, data: bool, depth: int) -> None:
        if len(value) <= (FEW if data else MANY):
            for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
                self._visit(f"{path}[{key!r}]"[:200], item, data, depth + 1)

    def _function(self, path: str, value: Any, data: bool, depth: int) -> None:
        if isinstance(value, functools.partial):
            for name, part in (("func", value.func), ("args", value.args), ("keywords", value.keywords)):
                self._visit(f"{path}.{name}", part, data, depth + 1)
            return
        function = value
        if isinstance(value, MethodType):
            self._visit(joined(path, "self"), value.__self__, data, depth + 1)
            function = value.__func__
            if isinstance(function, FunctionType) and is_users(type(value.__self__)):
                for name in names_in(function.__code__)[0]:  # its other methods may use other variables
                    method = getattr(type(value.__self__), name, None)
                    if isinstance(method, FunctionType):
                        self._visit(joined(path, name), method, data, depth + 1)
        if isinstance(function, FunctionType) and is_users(function):
            self._held(path, FunctionSlots(function), data, depth)
            for default in (function.__defaults__ or (), function.__kwdefaults__ or {}):
                self._visit(f"{path}.<defaults>", default, data, depth + 1)

    def _instance(self, path: str, value: Any, data: bool, depth: int) -> None:
        kind = type(value)
        if kind.__module__.partition(".")[0] in SKIPPED or isinstance(value, BuiltinMethodType):
            return
        data = data or isinstance(value, Dataset | Sampler)
        if data or is_users(kind):
            self._held(path, Slots(value, "data" if data else "user"), data, depth)
        else:
            for name, item in held(value).items():
                self._visit(joined(path, name), item, data, depth + 1)
        call = getattr(kind, "__call__", None)  # noqa: B004  # the function itself is wanted
        if isinstance(call, FunctionType):
            self._visit(path, MethodType(call, value), data, depth + 1)

    def _held(self, path: str, slots: Slots, data: bool, depth: int) -> None:
        self.slots[path if path not in self.slots else f"{path}'"] = slots
        for name, item in slots.get().items():
            self._visit(joined(path, name), item, data, depth + 1)


def joined(path: str, name: str) -> str:
    """Return the path to an attribute."""
    return f"{path}.{name}" if path and name else path or name


def made_anew(found: Inventory, path: str, state: Any) -> Generator | None:
    """Return a generator of the kind that has this state, put where there is none yet; None if it has no place.

    Some are made where they are first needed, which in another process has not happened yet.
    """
    owner, _, name = path.rpartition(".")
    slots = found.slots.get(owner)
    if slots is None:
        return None
    generator = like_state(state)
    slots.set(name, generator)
    return generator


_LIBRARIES = tuple(sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_users(thing: Any) -> bool:
    """Tell whether a class or function is the user's own, and not a library's."""
    name = getattr(thing, "__module__", None) or ""
    if name.partition(".")[0] in SKIPPED:
        return False
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    return name == "__main__" or (file is not None and not file.startswith(_LIBRARIES))


def position(iterator: Iterator[Any]) -> Any:
    """Return what tells how far an iterator has come, as far as that can be seen."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return None if frame is None else {"at": frame.f_lasti, **frame.f_locals}
    if hasattr(iterator, "_num_yielded"):  # a DataLoader's
        return iterator._num_yielded
    hint = getattr(iterator, "__length_hint__", None)
    return hint() if hint is not None else repr(iterator)
