"""What the parts of a job hold by name: remembered when a state is captured, and put back."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autolrs_plugin.training.hooks import HOOKS_OF_ALL, hooks_of
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.plain import MOST_BYTES, has_grown, is_plain
from autolrs_plugin.training.rng import Generator, like_state
from autolrs_plugin.training.slots import Slots
from autolrs_plugin.training.tree import Restorer


@dataclass
class Origins:
    """The job's own objects when a state was captured: they are what is put back.

    Attributes:
        found: the inventory.
        parameters: every parameter by name.
        names: the name of every parameter by its id.
        notes: what each copy is a copy of.
        objects: by path and name, what is held that is no plain value.
        lengths: by path and name, how long a list is that is too long to be copied.
        params: by the path of an optimizer, the parameters of each group.
        dicts: owners of dictionaries (children, parameters and hooks) with what is in them, by name.
        classes: of each object of which there are attributes, its class.
        orders: the names of the items of dictionaries, in their order, by path.
        memory: tensors, each with another one on its memory.
    """

    found: Inventory
    parameters: dict[str, torch.Tensor]
    names: dict[int, str]
    notes: dict[int, Any] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    params: dict[str, list[list[torch.Tensor]]] = field(default_factory=dict)
    dicts: list[tuple[Any, dict[str, dict[Any, Any]]]] = field(default_factory=list)
    classes: list[tuple[Any, type]] = field(default_factory=list)
    orders: dict[str, list[str]] = field(default_factory=dict)
    memory: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def plain_in(slots: Slots, names: Container[int]) -> dict[str, Any]:
    """Return the plain values that are held and not too large to be copied; `names` has the ids of the parameters."""
    most = MOST_BYTES[slots.kind]
    return {k: v for k, v in slots.get().items() if is_plain(v, names, most)}


def held_in(
    found: Inventory, names: Container[int], kinds: Container[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return what is held, by path and name: plain values in slots of some kinds, and all that is none."""
    plain: dict[str, dict[str, Any]] = {}
    objects: dict[str, dict[str, Any]] = {}
    for path, slots in found.slots.items():
        values: dict[str, Any] = {}
        others: dict[str, Any] = {}
        most = MOST_BYTES[slots.kind]
        for name, value in slots.get().items():
            (values if is_plain(value, names, most) else others)[name] = value
        objects[path] = others
        if slots.kind in kinds:
            plain[path] = values
    return plain, objects


def hold_dicts(origins: Origins) -> None:
    """Note the children, parameters, buffers and hooks of modules, and the hooks of optimizers and parameters."""
    owners = [
        *origins.found.modules.values(),
        *origins.found.optimizers.values(),
        *origins.parameters.values(),
        *HOOKS_OF_ALL,
    ]
    for owner in owners:
        dicts = hooks_of(owner)
        if isinstance(owner, torch.nn.Module):
            dicts |= {name: getattr(owner, name) for name in ("_parameters", "_modules", "_buffers")}
        origins.dicts.append((owner, {name: dict(held) for name, held in dicts.items()}))


def restore_dicts(origins: Origins) -> None:
    """Put back the children, parameters and hooks that were noted."""
    for owner, dicts in origins.dicts:
        for name, now in {**hooks_of(owner), **{n: getattr(owner, n) for n in dicts}}.items():
            then = dicts.get(name, {})  # a tensor has no dictionary of hooks before it has a hook
            if [(k, id(v)) for k, v in now.items()] != [(k, id(v)) for k, v in then.items()]:
                now.clear()
                now.update(then)


def restore_slots(restorer: Restorer, attributes: Mapping[str, Any], origins: Origins) -> None:
    """Put back what is held by name.

    Args:
        restorer: writes the copies back.
        attributes: the copies of plain values, by path and name.
        origins: the objects that are put back; those of a state that was read from a file hold none.
    """
    in_memory = bool(origins.dicts)
    for path, slots in origins.found.slots.items():
        kept, now = attributes.get(path, {}), slots.get()
        then = origins.objects.get(path, {})
        for name, value in reversed(now.items()):
            made = path in attributes and name not in kept and name not in then
            plain = made and (in_memory or slots.whole) and is_plain(value, origins.names)
            # A library puts things into a module when it is first used, and does not look for them again.
            users = slots.kind in ("user", "data") or is_users(type(value))
            if plain or (made and in_memory and users):
                slots.delete(name)
        for name, thing in then.items():
            if now.get(name) is not thing:
                slots.set(name, thing)
            if name in origins.lengths.get(path, {}) and not slots.leaves(name, thing):
                del thing[origins.lengths[path][name] :]
        for name, value in kept.items():
            if slots.leaves(name, now.get(name)) and has_grown(value, now.get(name)):
                continue
            restored = restorer.restored(now.get(name), value)
            if slots.copies or name not in now or now[name] is not restored:
                slots.set(name, restored)


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
