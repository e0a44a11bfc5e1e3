"""State that a framework keeps in plain attributes of its objects: rolled back with the job, or kept aside."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from autolrs_plugin.training.snapshot import Stateful
from autolrs_plugin.training.tree import Copier, Restorer


class PlainAttributes:
    """The plain attributes of an object (counters, sums, lists of metrics), as something that can be rolled back.

    Args:
        owner: the object.
        leave: names of attributes that are data, or otherwise not the object's state.
    """

    def __init__(self, owner: Any, leave: Sequence[str] = ()) -> None:
        self._owner = owner
        # What torch keeps in a module (parameters, buffers, hooks, modes) is rolled back with the model.
        torchs = vars(torch.nn.Module()) if isinstance(owner, torch.nn.Module) else ()
        self._leave = frozenset(leave).union(torchs)

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {k: v for k, v in vars(self._owner).items() if k not in self._leave and _is_plain(v)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the attributes, and delete those that are new."""
        for name in self.state_dict().keys() - state.keys():
            delattr(self._owner, name)
        for name, value in state.items():
            setattr(self._owner, name, value)


@contextmanager
def kept(*things: Stateful) -> Iterator[None]:
    """Whatever happens inside, the state of `things` is afterwards what it was before."""
    states = [Copier().copy(thing.state_dict()) for thing in things]
    try:
        yield
    finally:
        for thing, state in zip(things, states, strict=True):
            thing.load_state_dict(Restorer().restored(None, state))


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, torch.nn.Parameter)
    if isinstance(value, dict):
        return all(_is_plain(v) and not isinstance(k, torch.Tensor) for k, v in value.items())
    if isinstance(value, list | tuple | set | deque):
        return all(_is_plain(v) for v in value)
    return isinstance(value, bool | int | float | str | None)
