"""What there was of a job when it was made: what a file leaves out, for each process makes it so."""

from collections.abc import Container, Mapping
from typing import Any

import torch

from autolrs_plugin.training.fingerprint import digest_of
from autolrs_plugin.training.holdings import plain_in
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.items import MemberSlots
from autolrs_plugin.training.optimizers import params_of
from autolrs_plugin.training.references import References, lost_in, orders_of
from autolrs_plugin.training.resuming import Places, check_switches
from autolrs_plugin.training.tree import Copier
from autolrs_plugin.training.watched import data_seen, lasting_switches

MADE, REFERENCES, ORDERS, GONE, SWITCHES = "made", "references", "orders", "gone", "switches"
"""Parts of a state: what steps have made, which another process has not; which objects are where; orders of items; what
modules do not have any more; and settings of the process that steps have changed."""

_PARTS = ("_modules", "_parameters", "_buffers")


class Initial:
    """What there was.

    Args:
        found: the inventory then.
        parameters: all parameters, by name.
        names: their ids.
    """

    def __init__(self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]) -> None:
        self._values = {
            (path, name): _digest(value)
            for path, slots in found.slots.items()
            if slots.kind in ("user", "data")
            for name, value in plain_in(slots, names).items()
        }
        self._places = Places(found, parameters)
        self._members = {path: data_seen(slots.owner) for path, slots in _members_in(found).items()}
        self._references = References(found)
        self._optimized = {id(p): p for optimizer in found.optimizers.values() for p in params_of(optimizer)}
        self._parts = {path: _names_in(module) for path, module in found.modules.items()}
        self._switches = lasting_switches()

    def made(self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]) -> dict[str, str]:
        """Return what steps have made, or put where something else was: what it is, by the path to it."""
        missing = self._missing(found, parameters, names)
        moved = [path for path in missing if self._references.know(found, path)]
        return {p: k for p, k in missing.items() if p not in moved} | lost_in(self._references.told(found))

    def parts(self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]) -> dict[str, Any]:
        """Return the parts of a state for a file that say what is another thing now than then."""
        return {
            MADE: self._missing(found, parameters, names),
            REFERENCES: self._references.told(found),
            ORDERS: orders_of(found),
            GONE: self._gone(found),
            SWITCHES: {k: v for k, v in lasting_switches().items() if v != self._switches.get(k)},
        }

    def put_back(self, state: Mapping[str, Any], found: Inventory) -> None:
        """Put the objects of this process where a state from a file says.

        Raises:
            ValueError: there is something in it that this process has not.
        """
        check_switches(state.get(SWITCHES, {}), lasting_switches())
        self._references.put_back(state.get(REFERENCES, {}), found)
        for path, kinds in state.get(GONE, {}).items():
            for kind, names in kinds.items():
                for name in names if path in found.modules else ():
                    getattr(found.modules[path], kind).pop(name, None)

    def _missing(
        self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]
    ) -> dict[str, str]:
        """Return what has no place here, but for parameters that only an optimizer has now, and had at first, too."""
        missing = self._places.missing(found, parameters, names)
        left = {f"{path}." for path in found.optimizers}
        return {
            path: kind
            for path, kind in missing.items()
            if not (path.rstrip("0123456789") in left and id(parameters.get(path)) in self._optimized)
        }

    def _gone(self, found: Inventory) -> dict[str, dict[str, list[str]]]:
        """Return the children, parameters and buffers that modules had then and have not now, by path and kind."""
        gone: dict[str, dict[str, list[str]]] = {}
        for path, kinds in self._parts.items():
            now = _names_in(found.modules[path]) if path in found.modules else kinds
            for kind, names in kinds.items():
                if missing := [name for name in names if name not in now[kind]]:
                    gone.setdefault(path, {})[kind] = missing
        return gone

    def changed(self, found: Inventory, names: Container[int]) -> dict[str, Any]:
        """Return plain attributes by path and name; the user's only as far as the script did not set them so."""
        places = found.lasting()
        attributes = {path: plain_in(slots, names) for path, slots in places.items()}
        for path, values in attributes.items():
            slots = places[path]
            fresh = slots.whole or self._references.moved(path, slots)
            known = [] if fresh else [n for n in values if (path, n) in self._values]
            for name in known:
                if _digest(values[name]) == self._values[path, name]:
                    del values[name]
        for path, slots in _members_in(found).items():
            if data_seen(slots.owner) != self._members.get(path):
                attributes[path] = slots.stored(names)
        return attributes


def _names_in(module: torch.nn.Module) -> dict[str, list[str]]:
    return {kind: list(getattr(module, kind)) for kind in _PARTS}


def _digest(value: Any) -> str:
    return digest_of(Copier(share=True).copy(value, note=True))


def _members_in(found: Inventory) -> dict[str, MemberSlots]:
    return {path: slots for path, slots in found.slots.items() if isinstance(slots, MemberSlots)}
