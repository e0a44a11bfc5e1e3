"""What steps make on the way has no place in another process, which has not made it: said when a state is written.

Nothing of a user's class can be made anew from a file without running code that the file names. So what was not there
at construction is named in a state, and whoever goes to that state in a process without it is refused.
"""

import logging
from collections import deque
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from autolrs_plugin.training.checking import named
from autolrs_plugin.training.flags import LockSlots
from autolrs_plugin.training.holdings import plain_in
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.items import BarSlots, ItemSlots, MemberSlots
from autolrs_plugin.training.libraries import WALKED_ONLY, is_users
from autolrs_plugin.training.lost import SHOWN
from autolrs_plugin.training.plain import joined
from autolrs_plugin.training.slots import ClassSlots, FunctionSlots, Slots, VariableSlots, held

logger = logging.getLogger("autolrs_plugin")

ADVICE = "make it before AutoLRS is made"

TRAINS = ("a module", "an optimizer", "a parameter", "a parameter group")
"""What makes a job another one, so that a run cannot be gone on with where it is made beforehand."""


class Places:
    """Where a job has places for what a state holds.

    Args:
        found: the inventory.
        parameters: the names of all parameters.
    """

    def __init__(self, found: Inventory, parameters: Iterable[str]) -> None:
        self._slots = frozenset(found.lasting())
        self._whole = frozenset((*found.modules, *found.stateful, *found.generators))
        self._parameters = frozenset(parameters)
        self._groups = {path: len(optimizer.param_groups) for path, optimizer in found.optimizers.items()}

    def missing(
        self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]
    ) -> dict[str, str]:
        """Return what is found now, has a state and has no place here: what it is, by the path.

        Args:
            found: the inventory now.
            parameters: all parameters now, by name.
            names: the ids of the parameters.
        """
        made = {path: named(owner) for path, owner in found.stateful.items() if path not in self._whole}
        for path, module in found.modules.items():
            if path not in self._whole and any(True for _ in (*module.parameters(), *module.buffers())):
                made[path] = f"{named(module)}, a module"
        for path, generator in found.generators.items():  # one that a variable holds is made anew
            if path not in self._whole and path.rpartition(".")[0] not in self._slots:
                made[path] = named(generator)
        for path, slots in found.lasting().items():
            new = path not in self._slots and _is_state(slots)
            if new and any(value is not None for value in plain_in(slots, names).values()):
                made[path] = named(slots.owner)
        made |= {path: "a parameter" for path in parameters if path not in self._parameters}
        for path, optimizer in found.optimizers.items():
            if path not in self._groups:
                made[path] = f"{named(optimizer)}, an optimizer"
            elif (now := len(optimizer.param_groups)) > self._groups[path]:
                made[joined(path, f"param_groups[{now - 1}]")] = "a parameter group"
        return {path: kind for path, kind in made.items() if not _is_inside(path, made)}

    def lacks(self, path: str) -> bool:
        """Tell whether there is nothing at a path that `missing` gave."""
        owner, _, group = path.rpartition(".")
        if group.startswith("param_groups["):
            return self._groups.get(owner, 0) <= int(group[len("param_groups[") : -1])
        return path not in {*self._slots, *self._whole, *self._parameters, *self._groups}


def refill(found: Inventory, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Take along containers that are short here, and were too long for what holds them when a state was taken.

    Args:
        found: the inventory now; it has their places afterwards.
        attributes: the values in the state, by path and name.

    Raises:
        ValueError: there is no container where one was.
    """
    for path, values in attributes.items():
        if MemberSlots.NAME in values and path not in found.slots:
            container = _held_at(found, path)
            if not isinstance(container, list | deque | dict | set):
                check_made({path: "a long container"}, Places(found, ()))
            found.slots[path] = MemberSlots(container)


def _held_at(found: Inventory, path: str) -> Any:
    """Return what is held at a path; None where nothing is."""
    owner, _, name = path.rpartition(".")
    slots = found.slots.get(owner)
    if slots is None and owner and isinstance(around := _held_at(found, owner), dict | list):
        slots = ItemSlots(around)
    return None if slots is None else slots.get().get(name)


def _is_state(slots: Slots) -> bool:
    """Tell whether what slots hold may be a state: the texts of classes and functions are there in each process."""
    if isinstance(slots, ClassSlots | FunctionSlots | BarSlots | MemberSlots | LockSlots):
        return False
    if isinstance(slots, VariableSlots):
        return slots.encloses
    kind = type(slots.owner)
    if kind.__module__.startswith(WALKED_ONLY) and not is_users(kind):
        return False
    return slots.kind != "data" or is_users(kind)  # a library's files, opened when they are first read


def _is_inside(path: str, others: Container[str]) -> bool:
    """Tell whether a path leads through another one."""
    return any(path[:i] in others for i, sign in enumerate(path) if sign in ".[<" and i)


def shown(made: Mapping[str, str]) -> str:
    """Return the first of what was made, for a sentence."""
    more = f" and {len(made) - SHOWN} more" if len(made) > SHOWN else ""
    return ", ".join(f"{path} ({kind})" for path, kind in list(made.items())[:SHOWN]) + more


def check_made(made: Mapping[str, str], places: Places) -> None:
    """See that all that steps had made when a state was taken is there.

    Raises:
        ValueError: something is missing; the message names it.
    """
    if not (lost := {path: kind for path, kind in made.items() if places.lacks(path)}):
        return
    trains = any(kind.endswith(TRAINS) for kind in lost.values())
    raise ValueError(
        f"run_dir: holds a state of what steps had made: {shown(lost)}; it is not in this process, and a resume cannot "
        "create it: "
        + (
            f"begin a new run, and {ADVICE} there (an optimizer takes all groups from the beginning, for what needs no "
            "gradient yet it leaves alone)."
            if trains
            else f"{ADVICE}, and a resume puts its values back."
        )
    )


def check_switches(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """See that settings which steps had changed when a state was taken are the same here.

    Raises:
        ValueError: one is not; the message names it.
    """
    if other := [name for name, value in then.items() if now.get(name) != value]:
        values = ", ".join(f"{name} is {then[name]} there and {now.get(name)} here" for name in other)
        raise ValueError(
            f"run_dir: holds a state in which train_step had changed settings of the process, which a resume cannot "
            f"change: {values}; set them so before AutoLRS is made."
        )


def warn_of_buckets(model: torch.nn.Module) -> None:
    """Warn if what a communication hook of DistributedDataParallel keeps goes by DDP's buckets of gradients.

    A new process makes its buckets in another order until its first step, so that what was kept of one would be
    applied to another.
    """
    for module in model.modules():
        for _, state in vars(module).get("_comm_hooks", ()):
            if any(isinstance(value, dict) for value in held(state).values()):
                logger.warning(
                    "run_dir: the communication hook of %s keeps state by DDP's buckets (%s), which a new process "
                    "makes in another order; a run that is resumed is near the one that was not stopped, not the same "
                    "to the bit.",
                    named(module),
                    type(state).__name__,
                )
