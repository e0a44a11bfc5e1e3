"""A journal told to a controller: how a run is resumed, and looked at afterwards."""

import math
from collections.abc import Iterator
from dataclasses import fields

from autolrs_plugin.core.actions import Action
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import Entry, Journal, JournalError
from autolrs_plugin.core.state import RunState


def replay(journal: Journal, controller: Controller) -> Iterator[Entry]:
    """Tell a new controller all results of a journal; yield each entry that has one after it was told.

    Raises:
        JournalError: the controller decides otherwise than the journal has it.
    """
    for number, entry in enumerate(journal.entries):
        action = controller.next()
        if not same_action(action, entry.action):
            raise JournalError(
                f"{journal.path}: action {number} was {_short(entry.action)}, and would now be {_short(action)}: the "
                "run was decided by another version of autolrs_plugin or its libraries; nothing of it is used."
            )
        if entry.result is not None:
            controller.tell(entry.result)
            yield entry
    # What the decisions took when they were made, not what it took to make them again.
    books = [entry.books for entry in journal.entries if entry.books]
    if books:
        controller.ledger.take_over(books[-1])


def recorded(journal: Journal) -> RunState:
    """Return what a journal's actions came to, without deciding anything again: no stages, whatever the version."""
    state = RunState(AutoLRSConfig.from_mapping(journal.header["config"], origin=str(journal.path)))
    for entry in journal.entries:
        if entry.result is not None:
            state.observe(entry.action, entry.result)
    return state


def same_action(a: Action, b: Action) -> bool:
    """Tell whether two actions are the same, their rates up to rounding.

    Another processor rounds differently in the last bits, and a job may well resume on another machine.
    """
    if type(a) is not type(b):
        return False
    for name in (f.name for f in fields(a)):
        x, y = getattr(a, name), getattr(b, name)
        xs, ys = (x, y) if isinstance(x, tuple) else ((x,), (y,))
        if len(xs) != len(ys) or not all(
            math.isclose(p, q, rel_tol=1e-6) for p, q in zip(xs, ys, strict=True)
        ):
            return False
    return True


def _short(action: Action) -> str:
    text = repr(action)
    return text if len(text) <= 120 else text[:117] + "..."
