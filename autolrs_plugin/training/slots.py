"""What holds values by name: attributes of objects and classes, variables of functions. For items, see `items`.

Each kind reads what is held and sets it, so that a rollback treats all alike.
"""

import dis
import sys
from collections import Counter
from collections.abc import Container, Iterable
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from autolrs_plugin.training.plain import ATOMS, attributes_of, is_log

_TORCHS = frozenset(vars(torch.nn.Module()))
_OPTIMIZERS = frozenset({"param_groups", "state"})
_LOADERS = frozenset(vars(torch.utils.data.DataLoader([])))
_TORCHS_KINDS = (torch.nn.Module, torch.optim.Optimizer, torch.utils.data.DataLoader)
DESCRIPTORS = (classmethod, staticmethod, property, MemberDescriptorType)
"""What is in a class for its objects; what functions are in it is looked at by itself."""

STORES = (
    *("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"),
    *("DELETE_GLOBAL", "DELETE_DEREF", "DELETE_ATTR"),
)

METHODS = ("LOAD_METHOD", "LOAD_ATTR")
LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", *METHODS)
SILENT = ("CACHE", "PRECALL", "RESUME", "NOP", "COPY", "EXTENDED_ARG")
"""Instructions that say nothing about what code does."""

BY_STRING = {
    *("globals", "vars", "__dict__", "setattr", "delattr"),
    *("modules", "import_module", "__import__"),
}
"""What a function reaches variables with whose names are strings in it."""

MAKES_UP = {"globals", "exec", "eval"}
MAKES_UP_OF_OTHERS = {"vars", "__dict__", "setattr", "delattr"}
"""With what a function sets variables, its own module's and other modules', whose names it may make up."""


class Slots:
    """The attributes of an object.

    Args:
        owner: the object.
        kind: `module`, `optimizer`, `data` (data sets, samplers, collators) or `user` (all others).
        leave: names of attributes that are not its state.

    Attributes:
        kind: as given.
        lasts: whether a name means the same at another time, and in another process.
        whole: whether all of it goes into files, and not only what the script has not set itself.
        copies: whether what is got is a copy, so that nothing written into it is held.
    """

    whole = copies = False
    lasts = True

    def __init__(self, owner: Any, kind: str, leave: Container[str] = ()) -> None:
        self._owner = owner
        self.kind = kind
        self._leave = leave

    @property
    def owner(self) -> Any:
        """Whose attributes, variables or items they are."""
        return self._owner

    def get(self) -> dict[str, Any]:
        """Return what is held now, by name."""
        found = held(self._owner)
        if not (self._leave or isinstance(self._owner, _TORCHS_KINDS)):
            return found
        return {k: v for k, v in found.items() if not self._is_torchs(k) and k not in self._leave}

    def set(self, name: str, value: Any) -> None:
        """Hold another object."""
        # Not setattr: what is put back has passed there once, and some objects forbid it or do more.
        if name in slot_names(type(self._owner)):
            object.__setattr__(self._owner, name, value)
        else:
            attributes_of(self._owner)[name] = value

    def delete(self, name: str) -> None:
        """Hold nothing there."""
        object.__delattr__(self._owner, name)

    def leaves(self, name: str, value: Any) -> bool:
        """Tell whether what is held is a list of numbers that is the user's own log of what happened, which stays."""
        return False

    def _is_torchs(self, name: str) -> bool:
        if isinstance(self._owner, torch.nn.Module):
            return name in _TORCHS
        if isinstance(self._owner, torch.optim.Optimizer):
            return name in _OPTIMIZERS or name.endswith("_hooks")
        return isinstance(self._owner, torch.utils.data.DataLoader) and name in _LOADERS


class WrapperSlots(Slots):
    """What of DistributedDataParallel's own attributes decides about a later step.

    Whether buffers are sent before it: an evaluation turns that off, until a step has been taken; after one that is
    taken back, the next step would miss it. And the hooks that exchange gradients, each with its state.
    """

    NAMES = ("require_forward_param_sync", "_comm_hooks")

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, "module")

    def get(self) -> dict[str, Any]:
        """Return those that there are."""
        return {name: getattr(self._owner, name) for name in self.NAMES if hasattr(self._owner, name)}


class NumberSlots(Slots):
    """The numbers among the attributes of an object whose other attributes are somebody else's, or nobody's state."""

    def get(self) -> dict[str, Any]:
        """Return the numbers."""
        return {k: v for k, v in super().get().items() if isinstance(v, int | float)}


class ParameterSlots(Slots):
    """The attributes that somebody has given to the parameters of a module, as `weight.attribute`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, "module")

    def get(self) -> dict[str, Any]:
        """Return the attributes."""
        parameters = [(n, p) for n, p in self._owner._parameters.items() if p is not None]
        return {f"{n}.{k}": v for n, p in parameters if p.__dict__ for k, v in p.__dict__.items()}

    def set(self, name: str, value: Any) -> None:
        """Set an attribute."""
        parameter, _, attribute = name.partition(".")
        self._owner._parameters[parameter].__dict__[attribute] = value

    def delete(self, name: str) -> None:
        """Delete an attribute."""
        parameter, _, attribute = name.partition(".")
        del self._owner._parameters[parameter].__dict__[attribute]


class ClassSlots(Slots):
    """The attributes of a class of the user's own, its functions included, which a step may replace."""

    def __init__(self, owner: type) -> None:
        super().__init__(owner, "user")

    def get(self) -> dict[str, Any]:
        """Return the attributes that the class itself has."""
        return {
            k: v
            for k, v in list(vars(self._owner).items())
            if not (
                k.startswith(("__", "_abc_")) or isinstance(v, MemberDescriptorType) or self._is_enums(k, v)
            )
        }

    def set(self, name: str, value: Any) -> None:
        """Set an attribute."""
        type.__setattr__(self._owner, name, value)

    def delete(self, name: str) -> None:
        """Delete an attribute."""
        type.__delattr__(self._owner, name)

    def _is_enums(self, name: str, value: Any) -> bool:
        """Tell whether a name is Python's own in an enumeration; its members never change themselves."""
        return issubclass(self._owner, Enum) and (name.startswith("_") or isinstance(value, Enum))


def _variables_of(
    module: ModuleType, path: str, names: Iterable[str], stored: Container[str], is_users: Any
) -> dict[str, tuple[dict[str, Any], str]]:
    """Return where the variables of a module that bear one of the names are, those of modules in it included.

    Of a library's module, only numbers and the like, and functions, that the function sets.
    """
    places, variables, own = {}, vars(module), is_users(module)
    for name in names:
        if name not in variables:
            continue
        inner = variables[name]
        if not isinstance(inner, ModuleType):
            if own or (name in stored and isinstance(inner, (*ATOMS, FunctionType, BuiltinFunctionType))):
                places[f"{path}.{name}"] = (variables, name)
        elif own and inner.__name__.startswith(f"{module.__name__}.") and is_users(inner):
            places |= _variables_of(inner, f"{path}.{name}", names, stored, is_users)
    return places


class VariableSlots(Slots):
    """The variables of a function's surroundings that it uses: closure cells, globals, and those of modules.

    A list of numbers alone that has only grown, and that the function only adds to, is the user's own log of what it
    did: it stays. One that it looks at as well decides about later steps (a history of norms, by which to clip).

    Args:
        function: the function.
        is_users: tells whether a module or code is the user's own.

    Attributes:
        function: as given.
        modules: the variables of the user's modules of which it may make up names, by the module's name. Of all other
            modules only what it names counts: scripts keep counters and clocks in variables that no step reads.
    """

    def __init__(self, function: FunctionType, is_users: Any) -> None:
        super().__init__(function, "user")
        names, self._stored = names_in(function.__code__)
        self._read = read_in(function.__code__)
        self.function = function
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._cells = dict(cells)
        # A library's wrapper bears the name and module of the user's function in it; its globals are the library's.
        variables = function.__globals__ if is_users(function.__code__) else {}
        self._places = {name: (variables, name) for name in names if name not in self._cells}
        self.modules: dict[str, dict[str, Any]] = {}
        if MAKES_UP.intersection(names):
            self.modules[str(variables.get("__name__"))] = variables
        modules = {n: variables.get(n, sys.modules.get(n)) for n in names}  # it may import them by itself
        for name, module in {**modules, **self._contents()}.items():
            if isinstance(module, ModuleType):
                self._places |= _variables_of(module, name, names, self._stored, is_users)
                if is_users(module) and MAKES_UP_OF_OTHERS.intersection(names):
                    self.modules[module.__name__] = vars(module)

    def get(self) -> dict[str, Any]:
        """Return the variables that can change: those that the function sets, and what can be changed in place."""
        found = {n: variables[key] for n, (variables, key) in self._places.items() if key in variables}
        found |= self._contents()
        return {k: v for k, v in found.items() if self._sets(k) or not isinstance(v, (*ATOMS, ModuleType))}

    def set(self, name: str, value: Any) -> None:
        """Set a variable."""
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            if name not in self._places:
                raise ValueError(
                    f"{name}: is a variable in the state, and none of {self._owner.__qualname__} here; go on with the "
                    "script that wrote it."
                )
            variables, key = self._places[name]
            variables[key] = value

    def delete(self, name: str) -> None:
        """Unset a variable that the function has set; others were there before, and are the user's."""
        if not self._sets(name):
            return
        if name in self._cells:
            del self._cells[name].cell_contents
        else:
            variables, key = self._places[name]
            del variables[key]

    @property
    def encloses(self) -> bool:
        """Whether it has variables of a function around it, which are made anew with each call of that."""
        return bool(self._cells)

    def _contents(self) -> dict[str, Any]:
        found = {}
        for name, cell in self._cells.items():
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not set yet
                continue
        return found

    def leaves(self, name: str, value: Any) -> bool:
        """Tell whether it is a list of numbers to which the function only adds."""
        _, dot, variable = name.rpartition(".")
        return is_log(value) and dot + variable not in self._read

    def _sets(self, name: str) -> bool:
        return name.rpartition(".")[2] in self._stored


class FunctionSlots(Slots):
    """What a function holds itself: its attributes, and its default arguments as `<default 0>` or `<default name>`."""

    def __init__(self, function: FunctionType) -> None:
        super().__init__(function, "user")

    def get(self) -> dict[str, Any]:
        """Return the attributes and the default arguments."""
        function = self._owner
        found = dict(function.__dict__)
        found |= {f"<default {i}>": value for i, value in enumerate(function.__defaults__ or ())}
        return found | {f"<default {k}>": value for k, value in (function.__kwdefaults__ or {}).items()}

    def set(self, name: str, value: Any) -> None:
        """Set an attribute or a default argument."""
        function, default = self._owner, name.removeprefix("<default ").removesuffix(">")
        if default == name:
            function.__dict__[name] = value
        elif default.isdigit():
            values = list(function.__defaults__ or ())
            values[int(default)] = value
            function.__defaults__ = tuple(values)
        else:
            function.__kwdefaults__[default] = value

    def delete(self, name: str) -> None:
        """Delete an attribute."""
        del self._owner.__dict__[name]


class ContextSlots(Slots):
    """The value of a context variable."""

    def __init__(self, owner: ContextVar[Any]) -> None:
        super().__init__(owner, "user")

    def get(self) -> dict[str, Any]:
        """Return the value, if it is set."""
        nothing = object()
        value = self._owner.get(nothing)
        return {} if value is nothing else {"value": value}

    def set(self, name: str, value: Any) -> None:
        """Set the value."""
        self._owner.set(value)

    def delete(self, name: str) -> None:
        """Leave it: what has been set without a token at hand cannot be unset."""


_slot_names: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def slot_names(kind: type) -> dict[str, Any]:
    """Return the descriptors of a class's slots, by the names that they have there (private ones are renamed)."""
    if kind not in _slot_names:
        _slot_names[kind] = {
            name: member
            for base in reversed(kind.__mro__)
            if "__slots__" in vars(base)
            for name, member in vars(base).items()
            if isinstance(member, MemberDescriptorType)
        }
    return _slot_names[kind]


def functions_of(member: Any) -> list[Any]:
    """Return the functions in what a class has under a name."""
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset, member.fdel) if f is not None]
    if isinstance(member, staticmethod | classmethod):
        return [member.__func__]
    return [member] if isinstance(member, FunctionType) else []


def held(owner: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    found = {}
    for name, member in slot_names(type(owner)).items():
        try:
            found[name] = member.__get__(owner)
        except AttributeError:  # not set
            continue
    return {**found, **attributes_of(owner)}


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names that a function's code uses (globals and attributes), and those that it may set."""
    names = dict.fromkeys(code.co_names)
    stored = {i.argval for i in dis.get_instructions(code) if i.opname in STORES}
    if BY_STRING & names.keys():
        texts = [c for c in code.co_consts if isinstance(c, str)]
        spelt = [text for text in texts if all(part.isidentifier() for part in text.split("."))]
        names.update(dict.fromkeys(spelt))
        stored.update(spelt)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, set_there = names_in(constant)
            names.update(dict.fromkeys(inner))
            stored |= set_there
    return tuple(names), frozenset(stored)


@lru_cache(maxsize=4096)
def read_in(code: CodeType) -> frozenset[str]:
    """Return the names of what a function's code looks at, be it only once: not of lists that it only adds to.

    Those of attributes, which may be a module's variables, begin with a dot.
    """
    reads: Counter[str] = Counter()
    seen = [i for i in dis.get_instructions(code) if i.opname not in SILENT]
    for before, now, after in zip([None, *seen], seen, [*seen[1:], None], strict=False):
        name = f".{now.argval}" if now.opname.endswith(("_ATTR", "_METHOD")) else now.argval
        if now.opname in LOADS:
            adds = after is not None and after.opname in METHODS and after.argval in ("append", "extend")
            reads[name] += not adds
        elif now.opname in STORES and before is not None and before.argrepr == "+=":
            reads[name] -= 1
    inner = [read_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(name for name, times in reads.items() if times > 0).union(*inner)
