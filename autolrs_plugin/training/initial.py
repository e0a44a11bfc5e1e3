"""What there was of a job when it was made: what a file leaves out, for each process makes it so."""

from collections.abc import Container, Mapping
from typing import Any

from autolrs_plugin.training.fingerprint import digest_of
from autolrs_plugin.training.holdings import plain_in
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.items import MemberSlots
from autolrs_plugin.training.references import References, lost_in, orders_of
from autolrs_plugin.training.resuming import Places
from autolrs_plugin.training.tree import Copier
from autolrs_plugin.training.watched import data_seen

MADE, REFERENCES, ORDERS = "made", "references", "orders"
"""Parts of a state: what steps have made, which another process has not; which objects are where; orders of items."""


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

    def made(self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]) -> dict[str, str]:
        """Return what steps have made, or put where something else was: what it is, by the path to it."""
        missing = self._places.missing(found, parameters, names)
        moved = [path for path in missing if self._references.know(found, path)]
        return {p: k for p, k in missing.items() if p not in moved} | lost_in(self._references.told(found))

    def parts(self, found: Inventory, parameters: Mapping[str, Any], names: Container[int]) -> dict[str, Any]:
        """Return the parts of a state for a file that say what is another thing now than then."""
        return {
            MADE: self._places.missing(found, parameters, names),
            REFERENCES: self._references.told(found),
            ORDERS: orders_of(found),
        }

    def put_back(self, state: Mapping[str, Any], found: Inventory) -> None:
        """Put the objects of this process where a state from a file says.

        Raises:
            ValueError: there is something in it that this process has not.
        """
        self._references.put_back(state.get(REFERENCES, {}), found)

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


def _digest(value: Any) -> str:
    return digest_of(Copier(share=True).copy(value, note=True))


def _members_in(found: Inventory) -> dict[str, MemberSlots]:
    return {path: slots for path, slots in found.slots.items() if isinstance(slots, MemberSlots)}
