"""What a training job consists of: one inventory, found by walking from its parts to all that they reach.

In the job and restored: every module (the model, a teacher beside it, a metric) with its buffers, attributes and hooks;
every optimizer, wherever another one, a scheduler or a container holds it; everything with state_dict() and
load_state_dict(), such as LR schedulers; every random number generator; plain attributes of data sets, samplers and
collators; and, from the functions and hooks that the job is given, the variables and objects that they use, with the
attributes of their classes, their default arguments, and what containers hold.

Not in it: what libraries keep for themselves (loggers, bars), and data. Data, frozen weights, iterators and caches are
watched.
"""

import enum
import functools
import random
import site
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from autolrs_plugin.training.plain import ATOMS, BUFFERS, CONTAINERS, MANY, is_data, is_log, is_plain
from autolrs_plugin.training.rng import GENERATORS, Generator, like_state
from autolrs_plugin.training.slots import (
    WEAK,
    CacheSlots,
    ClassSlots,
    ContextSlots,
    FunctionSlots,
    ItemSlots,
    ParameterSlots,
    ResultSlots,
    Slots,
    VariableSlots,
    WrapperSlots,
    held,
)

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

WALKED_ONLY = (
    *TORCHS_OWN,
    *("torch.nn", "torch.optim", "torch.utils", "torch.cuda", "torch.autograd", "torch.profiler", "torch._"),
    *("transformers.trainer", "trl"),
)
"""Modules whose objects are looked through, and have no state that is not reached in another way."""

DEEP, REACH = 40, 100_000
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
        skip: objects that somebody else takes care of; what those with a state of their own refer to is walked to.
        data: whether the parts are data.
        code: whether to walk to what functions, hooks and classes use, and not only to what objects hold.

    Attributes:
        modules: every module.
        optimizers: every optimizer with a state of its own.
        stateful: what has a state_dict() and is neither.
        generators: random number generators.
        slots: whose attributes, variables and items are state.
        iterators: what is drawn from and cannot be set back.
        caches: what functools.cache and lru_cache have made: what is added can be taken away, and no more.
        data: containers of plain values, which nothing that can be set back holds.
    """

    def __init__(
        self, roots: Mapping[str, Any], skip: Mapping[str, Any], data: bool = False, code: bool = True
    ) -> None:
        self._code = code
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stateful: dict[str, Stateful] = {}
        self.generators: dict[str, Generator] = {}
        self.slots: dict[str, Slots] = {}
        self.iterators: dict[str, Iterator[Any]] = {}
        self.caches: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        # Some of what is found is made while looking: it must outlive its id.
        self._seen: dict[int, Any] = {id(thing): thing for thing in skip.values()}
        self._states: set[int] = set()
        self._classes: set[type] = set()
        for name, root in roots.items():
            self._visit(name, root, data)
        for name, thing in skip.items():
            if is_stateful(thing):
                self._stateful(name, thing, 0)

    def lasting(self) -> dict[str, Slots]:
        """Return the slots that have the same path at another time, and in another process."""
        passing = tuple(f"{path}." for path, slots in self.slots.items() if not slots.lasts)
        return {p: slots for p, slots in self.slots.items() if slots.lasts and not p.startswith(passing)}

    def _visit(self, path: str, value: Any, data: bool = False, depth: int = 0) -> None:
        passed = isinstance(value, PASSED)
        if passed or id(value) in self._seen or depth > DEEP or len(self._seen) > REACH:
            return
        self._seen[id(value)] = value
        if isinstance(value, GENERATORS):
            self.generators[path] = value
        elif isinstance(value, torch.nn.Module):
            self._module(path, value, depth)
        elif isinstance(value, torch.optim.Optimizer):
            self._optimizer(path, value, depth)
        elif isinstance(value, (*CONTAINERS, *WEAK)):
            self._container(path, value, data, depth)
        elif isinstance(value, FUNCTIONS):
            if self._code:
                self._function(path, value, data, depth)
        elif isinstance(value, type):
            self._class(value, depth)
        elif isinstance(value, DataLoader):
            for name in ("dataset", "sampler", "batch_sampler", "collate_fn", "generator"):
                self._visit(f"{path}.{name}", getattr(value, name, None), True, depth + 1)
        elif is_stateful(value) and not data:
            self.stateful[path] = value
            self._stateful(path, value, depth)
        elif isinstance(value, Iterator) and not is_users(type(value)):
            self.iterators[path] = value
        elif isinstance(value, ContextVar):
            self._held(path, ContextSlots(value), data, depth)
        elif isinstance(value, weakref.ref):
            self._visit(path, value(), data, depth + 1)
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
            self._held(f"{own}<parameters>", ParameterSlots(module), False, depth)
            self._hooks(own, module, depth)
            for key, parameter in module._parameters.items():
                self._hooks(joined(own, key), parameter, depth)
            self._class(type(module), depth)

    def _optimizer(self, path: str, optimizer: torch.optim.Optimizer, depth: int) -> None:
        if id(optimizer.state) not in self._states:  # Accelerate's optimizer has that of the one inside
            self._states.add(id(optimizer.state))
            self.optimizers[path] = optimizer
        self._held(path, Slots(optimizer, "optimizer"), False, depth)
        self._hooks(path, optimizer, depth)
        self._class(type(optimizer), depth)

    def _hooks(self, path: str, owner: Any, depth: int) -> None:
        """Walk to the hooks of a module, an optimizer or a tensor; a library's keep their state in the module."""
        for name, hooks in hooks_of(owner).items() if self._code else ():
            for index, hook in enumerate(hooks.values()):
                function = hook.__self__ if isinstance(hook, MethodType) else hook
                users = is_users(function) or is_users(type(function))
                if users or isinstance(function, functools.partial):
                    self._visit(f"{path}.{name}[{index}]", hook, False, depth + 1)

    def _stateful(self, path: str, thing: Stateful, depth: int) -> None:
        """Walk to what something with a state_dict() refers to, for it leaves that out; a user's may forget more."""
        kind, attributes = type(thing), held(thing)
        if kind.__module__.partition(".")[0] == "autolrs_plugin":
            return
        self._class(kind, depth)
        # What holds an iterator makes it anew: its other attributes are of that one, then.
        if is_users(kind) and not any(isinstance(v, Iterator) for v in attributes.values()):
            self._held(path, Slots(thing, "user"), False, depth)
            return
        for name, value in attributes.items():
            parts = list(value.values()) if isinstance(value, dict) else value
            for part in parts if isinstance(parts, list | tuple) and len(parts) <= MANY else [value]:
                if isinstance(part, REFERRED):
                    self._visit(joined(path, name), part, False, depth + 1)

    def _container(self, path: str, value: Any, data: bool, depth: int) -> None:
        if isinstance(value, CONTAINERS) and (len(value) > (FEW if data else MANY) or is_data(value)):
            self.data[path] = value
        elif data:
            for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
                self._visit(f"{path}[{key!r}]"[:200], item, data, depth + 1)
        else:
            self._items(path, value, data, depth)

    def _items(self, path: str, value: Any, data: bool, depth: int) -> None:
        """Take the items of a container that nothing else takes along."""
        if isinstance(value, Mapping):
            for index, key in enumerate(list(value)):
                self._visit(f"{path}.keys[{index}]", key, data, depth + 1)
        self._held(path, ItemSlots(value, "data" if data else "user"), data, depth)

    def _function(self, path: str, value: Any, data: bool, depth: int) -> None:
        if isinstance(value, functools.partial):
            self._visit(f"{path}.func", value.func, data, depth + 1)
            self._items(f"{path}.args", value.args, data, depth)
            self._items(f"{path}.keywords", value.keywords, data, depth)
        elif isinstance(value, BuiltinMethodType | MethodWrapperType):
            if not isinstance(value.__self__, ModuleType):
                self._items(joined(path, "self"), (value.__self__,), data, depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            if is_users(value):
                self.caches[path] = value
                self._held(path, CacheSlots(value), data, depth)
                self._held(f"{path}.results", ResultSlots(value), data, depth)
            self._visit(path, value.__wrapped__, data, depth + 1)
        elif isinstance(value, MethodType):
            self._visit(joined(path, "self"), value.__self__, data, depth + 1)
            self._visit(path, value.__func__, data, depth + 1)
        elif is_users(value):
            self._held(path, VariableSlots(value, is_users), data, depth)
            self._held(path, FunctionSlots(value), data, depth)

    def _class(self, kind: type, depth: int) -> None:
        """Take the attributes of a user's class along, and what its functions use."""
        for base in kind.__mro__ if self._code else ():
            if base in self._classes:
                continue
            self._classes.add(base)
            if not is_users(base) or issubclass(base, enum.Enum):
                continue
            path = f"class {base.__qualname__}"
            self._held(path, ClassSlots(base), False, depth)
            for name, member in vars(base).items():
                for function in functions_of(member):
                    self._visit(joined(path, name), function, False, depth + 1)

    def _instance(self, path: str, value: Any, data: bool, depth: int) -> None:
        kind = type(value)
        if kind.__module__.partition(".")[0] in SKIPPED and kind is not SimpleNamespace:
            return
        data = data or isinstance(value, Dataset | Sampler)
        if kind.__module__.startswith(WALKED_ONLY) and not data:
            for name, item in held(value).items():
                self._visit(joined(path, name), item, data, depth + 1)
        else:
            self._held(path, Slots(value, "data" if data else "user"), data, depth)
        self._class(kind, depth)
        call = getattr(kind, "__call__", None)  # noqa: B004  # the function itself is wanted
        if isinstance(call, FunctionType):
            self._visit(path, call, data, depth + 1)

    def _held(self, path: str, slots: Slots, data: bool, depth: int) -> None:
        while path in self.slots:
            path += "'"
        self.slots[path] = slots
        for name, item in slots.get().items():
            # A plain container is copied with what holds it; there is nothing else in it. A log stays.
            whole = isinstance(item, CONTAINERS) and is_plain(item)
            if not (whole or (slots.leaves_logs and is_log(item))):
                self._visit(joined(path, name), item, data, depth + 1)


PASSED = (*ATOMS, *BUFFERS, torch.Tensor, np.ndarray, ModuleType, random.SystemRandom)

FUNCTIONS = (
    *(FunctionType, MethodType, functools.partial, functools._lru_cache_wrapper),
    *(BuiltinMethodType, MethodWrapperType),
)

REFERRED = (
    *(torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *(FunctionType, MethodType, functools.partial),
)
"""What a state_dict() leaves out where it is only referred to."""


def hooks_of(owner: Any) -> dict[str, Any]:
    """Return the dictionaries of a module's, an optimizer's or a tensor's hooks, by name."""
    names = vars(owner) if isinstance(owner, torch.nn.Module | torch.optim.Optimizer) else _HOOKS_OF_TENSORS
    found = {name: getattr(owner, name, None) for name in names if name.endswith("_hooks")}
    return {name: hooks for name, hooks in found.items() if isinstance(hooks, dict)}


_HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def functions_of(member: Any) -> list[Any]:
    """Return the functions in what a class has under a name."""
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset, member.fdel) if f is not None]
    if isinstance(member, staticmethod | classmethod):
        return [member.__func__]
    return [member] if isinstance(member, FunctionType) else []


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


_LIBRARIES = (
    *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(site.getusersitepackages(), "<frozen"),
)


def is_users(thing: Any) -> bool:
    """Tell whether a module, class, function or code is the user's own, and not a library's."""
    if isinstance(thing, CodeType):
        return not thing.co_filename.startswith(_LIBRARIES)
    name = getattr(thing, "__name__" if isinstance(thing, ModuleType) else "__module__", None) or ""
    if not isinstance(name, str) or name.partition(".")[0] in SKIPPED:
        return False
    module = thing if isinstance(thing, ModuleType) else sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if name == "__main__":
        return True
    if file is not None:
        return not file.startswith(_LIBRARIES)
    code = getattr(thing, "__code__", None)  # of a script that was run by exec() or a loader of its own
    if isinstance(code, CodeType):
        return is_users(code)
    return bool(name) and module is None
