"""What a training job consists of: one inventory, found by walking from its parts to all that they reach.

In the job and restored: every module (the model, a teacher beside it, a metric) with its buffers, attributes and hooks;
every optimizer, wherever another one, a scheduler or a container holds it; everything with state_dict() and
load_state_dict(), such as LR schedulers; every random number generator; plain attributes of data sets, samplers and
collators; and, from the functions and hooks that the job is given, the variables and objects that they use, with the
attributes of their classes, their default arguments, and what containers hold.

Not in it: what libraries keep for themselves (loggers, all but the counts of bars), and data. Data, frozen weights,
iterators and caches are watched.
"""

import enum
import functools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import BuiltinMethodType, FunctionType, MethodType, MethodWrapperType, ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from autolrs_plugin.training.databases import DatabaseSlots, is_cursor, is_database
from autolrs_plugin.training.fingerprint import PARTS_OF
from autolrs_plugin.training.flags import FLAGS, is_shared_flag
from autolrs_plugin.training.handed import ELSEWHERE, is_channel
from autolrs_plugin.training.hooks import HOOKS_OF_ALL, hooks_of
from autolrs_plugin.training.items import (
    SHARED,
    WEAK,
    BufferSlots,
    CacheSlots,
    EnvironmentSlots,
    FieldSlots,
    InnerSlots,
    ItemSlots,
    MemberSlots,
    ResultSlots,
    buffer_of,
    special_slots,
)
from autolrs_plugin.training.kinds import FUNCTIONS, PASSED, REFERRED
from autolrs_plugin.training.libraries import (
    COUNTING,
    INSIDE,
    PLAINLY,
    SKIPPED,
    STATEFUL,
    STREAMS,
    TORCHS_OWN,
    WALKED_ONLY,
    is_opaque,
    is_users,
)
from autolrs_plugin.training.plain import (
    ALWAYS,
    CONTAINERS,
    MANY,
    MOST_BYTES,
    MOST_MEMBERS,
    OF_MEMBERS,
    bears,
    contents,
    count_at,
    entries,
    is_data,
    is_dense,
    is_plain,
    joined,
    shortened,
)
from autolrs_plugin.training.rng import GENERATORS, Generator
from autolrs_plugin.training.slots import (
    ClassSlots,
    ContextSlots,
    FunctionSlots,
    NumberSlots,
    ParameterSlots,
    Slots,
    VariableSlots,
    WrapperSlots,
    functions_of,
    held,
    names_in,
)
from autolrs_plugin.training.watched import RUNNING, called_by

DEEP, REACH = 40, 100_000
"""How far the walk goes: attributes in a row before it goes on afterwards, and objects in all."""

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
        roots: the parts, by the path that is theirs; the model has none, so that its modules have their own names. One
            of which only some attributes are its own is given as slots.
        skip: objects that somebody else takes care of; what those with a state of their own refer to is walked to.
        data: whether the parts are data.
        code: whether to walk to what functions, hooks and classes use.

    Attributes:
        modules: every module.
        optimizers: every optimizer with a state of its own.
        stateful: what has a state_dict() and is neither.
        generators: random number generators.
        slots: whose attributes, variables and items are state.
        iterators: what is drawn from and cannot be set back, such as a SeedSequence; and databases, which may be such.
        caches: what functools.cache and lru_cache have made: what is added can be taken away, and no more.
        shared: queues, semaphores, futures and executors: other threads may have a hand in them.
        flags, channels: locks and events, that others may have set; and what brings what other processes send.
        data: containers of plain values, which nothing that can be set back holds; and tensors that are not dense.
        bearers: tensors, arrays and containers that somebody has given attributes to, by their ids.
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
        self.iterators: dict[str, Any] = {}
        self.caches: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self.flags, self.channels = dict[str, Any](), dict[str, Any]()
        self.data: dict[str, Any] = {}
        self.bearers: dict[int, Any] = {}
        # Some of what is found is made while looking: it must outlive its id.
        self._seen: dict[int, Any] = {id(thing): thing for thing in skip.values()}
        self._states: set[int] = set()
        self._classes: set[type] = set()
        self._later: deque[tuple[str, Any, bool]] = deque()
        for name, root in roots.items():
            self._visit(name, root, data)
        for owner in HOOKS_OF_ALL if code and not data else ():
            self._hooks(owner.__name__, owner, 0)
        for name, thing in skip.items():
            if is_stateful(thing):
                self._stateful(name, thing, 0)
        while self._later:
            self._visit(*self._later.popleft())

    @property
    def whole(self) -> bool:
        """Whether all that can be reached was looked at."""
        return len(self._seen) <= REACH

    def lasting(self) -> dict[str, Slots]:
        """Return the slots that have the same path at another time, and in another process."""
        passing = tuple(f"{path}." for path, slots in self.slots.items() if not slots.lasts)
        return {p: slots for p, slots in self.slots.items() if slots.lasts and not p.startswith(passing)}

    def _visit(self, path: str, value: Any, data: bool = False, depth: int = 0) -> None:
        if type(value) in ALWAYS:
            return
        passed = isinstance(value, PASSED) or count_at(value) is not None
        if passed or id(value) in self._seen or len(self._seen) > REACH:
            return
        if depth > DEEP:
            self._later.append((shortened(path), value, data))
            return
        if isinstance(value, (torch.Tensor, np.ndarray)):
            self._array(path, value, data, depth)
            return
        if isinstance(value, enum.Enum):  # its members are looked at with their class
            self._class(type(value), depth)
            return
        self._seen[id(value)] = value
        if isinstance(value, SHARED):
            self.shared[path] = value
        if isinstance(value, FLAGS):
            self.flags[path] = value
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
            # What a class of the user's, or Accelerate, adds to torch's own attributes.
            self._held(path, Slots(value, "data"), True, depth)
        elif is_stateful(value) and not data and not type(value).__module__.startswith(STREAMS):
            self.stateful[path] = value
            self._stateful(path, value, depth)
        elif (special := special_slots(value, "data" if data else "user")) is not None:
            self._held(path, special, data, depth)
        elif is_database(value):
            self.iterators[path] = value
            self._held(f"{path}<database>", DatabaseSlots(value, "user"), data, depth)
            self._instance(path, value, data, depth)
        elif isinstance(value, (np.random.SeedSequence, *RUNNING)) or (
            isinstance(value, Iterator) and not is_users(type(value))
        ):
            self.iterators[path] = value
            source = getattr(value, "connection", None) if is_cursor(value) else called_by(value)
            self._visit(f"{path}.source", source, data, depth + 1)
        elif isinstance(value, Slots | ContextVar):
            self._held(path, value if isinstance(value, Slots) else ContextSlots(value), data, depth)
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
                if parameter is not None:
                    self._seen[id(parameter)] = parameter
                self._hooks(joined(own, key), parameter, depth)
            self._class(type(module), depth)

    def _optimizer(self, path: str, optimizer: torch.optim.Optimizer, depth: int) -> None:
        if id(optimizer.state) not in self._states:  # Accelerate's optimizer has that of the one inside
            self._states.add(id(optimizer.state))
            self.optimizers[path] = optimizer
        self._held(path, Slots(optimizer, "optimizer"), False, depth)
        self._hooks(path, optimizer, depth)
        self._class(type(optimizer), depth)

    def _array(self, path: str, value: Any, data: bool, depth: int) -> None:
        """Take the attributes of a tensor or an array along, its hooks, and its items, if they are objects."""
        if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
            self._hooks(path, value, depth)
        kind = "data" if data else "user"
        if isinstance(value, torch.Tensor) and not is_dense(value) and not value.is_meta:
            self._seen[id(value)] = self.data[path] = value
            if value.layout in PARTS_OF:  # what is written in place goes to these
                parts = tuple(getattr(value, name)() for name in PARTS_OF[value.layout])
                self._held(path, ItemSlots(parts, kind), data, depth)
        if bears(value):
            self._seen[id(value)] = self.bearers[id(value)] = value
            self._held(path, Slots(value, kind), data, depth)
        if isinstance(value, np.ndarray) and value.dtype == object and value.size <= (FEW if data else MANY):
            self._seen[id(value)] = value
            self._held(path, ItemSlots(value, kind), data, depth)
        elif isinstance(value, np.ndarray) and value.dtype.hasobject:
            self.data[path] = value

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
            few = isinstance(value, dict | list | tuple) and len(value) <= MANY
            for part in contents(value) if few else [value]:
                if isinstance(part, REFERRED):
                    self._visit(joined(path, name), part, False, depth + 1)

    def _container(self, path: str, value: Any, data: bool, depth: int) -> None:
        if isinstance(value, CONTAINERS) and bears(value):
            self.bearers[id(value)] = value
            self._held(path, Slots(value, "data" if data else "user"), data, depth)
            self._items(path, value, data, depth)
        elif isinstance(value, CONTAINERS) and (len(value) > self._most(value, data) or is_data(value)):
            self.data[path] = value
            self._members(path, value, data, depth)
        elif data:
            for key, item in entries(value):
                self._visit(f"{path}[{key!r}]"[:200], item, data, depth + 1)
        else:
            self._items(path, value, data, depth)

    def _most(self, value: Any, data: bool) -> int:
        """Return how many items a container may have that is no data: generators are no data, however many."""
        return FEW if data and not isinstance(next(iter(value), None), GENERATORS) else MANY

    def _members(self, path: str, value: Any, data: bool, depth: int, grows: bool = False) -> None:
        """Take along which objects are in a long container of the user's."""
        if isinstance(value, list | deque | dict | set) and not data and len(value) <= MOST_MEMBERS:
            self._held(path, MemberSlots(value, grows), data, depth)

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
            if "environ" in names_in(value.__code__)[0] and "os.environ" not in self.slots:
                self._held("os.environ", EnvironmentSlots(), data, depth)

    def _class(self, kind: type, depth: int) -> None:
        """Take the attributes of a user's class along, and what its functions use."""
        for base in kind.__mro__ if self._code else ():
            if base in self._classes:
                continue
            self._classes.add(base)
            if not is_users(base):
                continue
            path = f"class {base.__qualname__}"
            self._held(path, ClassSlots(base), False, depth)
            for name, member in base.__members__.items() if issubclass(base, enum.Enum) else ():
                self._held(joined(path, name), Slots(member, "user", OF_MEMBERS), False, depth)
            for name, member in vars(base).items():
                for function in functions_of(member):
                    self._visit(joined(path, name), function, False, depth + 1)

    def _instance(self, path: str, value: Any, data: bool, depth: int) -> None:
        kind = type(value)
        if kind.__module__ in INSIDE:
            self._items(path, (getattr(value, INSIDE[kind.__module__], None),), data, depth)
            return
        keeps = kind.__module__.startswith(STATEFUL)
        skipped = kind.__module__.partition(".")[0] in SKIPPED and kind.__module__ not in PLAINLY
        if skipped and kind is not SimpleNamespace and not keeps:
            if kind.__module__.startswith(COUNTING):
                self._held(path, NumberSlots(value, "data" if data else "user"), data, depth)
            if kind.__module__.startswith(ELSEWHERE):
                kept = self.flags if is_shared_flag(value) else self.iterators
                (self.channels if is_channel(value) else kept)[path] = value
            return
        data = data or isinstance(value, Dataset | Sampler) or kind.__module__.startswith(STREAMS)
        own = "data" if data else "user"
        if (memory := buffer_of(value)) is not None and memory.nbytes > MOST_BYTES[own]:
            self.data[path] = value
        elif memory is not None:
            self._held(path, BufferSlots(value, own), data, depth)
        elif is_opaque(value):
            self._held(path, FieldSlots(value, own), data, depth)
            self._held(path, InnerSlots(value, own), data, depth)
        if keeps:  # some of it is as large as the gradients
            self._held(path, Slots(value, own if data else "optimizer"), data, depth)
        elif kind.__module__.startswith(WALKED_ONLY) and not data:
            for name, item in held(value).items():
                self._visit(joined(path, name), item, data, depth + 1)
        else:
            self._held(path, Slots(value, own), data, depth)
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
            if isinstance(item, CONTAINERS) and is_plain(item):
                continue
            if slots.leaves(name, item):
                self._members(joined(path, name), item, data, depth, grows=True)
            else:
                self._visit(joined(path, name), item, data, depth + 1)
