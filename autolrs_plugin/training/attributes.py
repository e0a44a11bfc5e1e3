"""The plain attributes of one object, as state that can be rolled back by itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autolrs_plugin.training.plain import is_plain
from autolrs_plugin.training.slots import Slots
from autolrs_plugin.training.tree import Copier, Restorer


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
