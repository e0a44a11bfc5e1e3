"""A journal played back to a controller: how a run is resumed, and how it is looked at afterwards."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from autolrs_plugin.core.actions import Action
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.hindsight import SAME, with_retreats, without_plateau
from autolrs_plugin.core.journal import Entry, Journal, JournalError
from autolrs_plugin.core.plans.staged import chunk_steps
from autolrs_plugin.core.schedule import DECAY, ramp_steps, warmup_steps
from autolrs_plugin.core.state import RunState

HINTS = {
    "initial": " (resume=True takes over the run's own)",
    "prior_lr": " (prior='optimizer' reads the optimizer's rate, which training changes: create it again)",
}
"""What may be the reason for a difference."""


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


def check_same_run(
    journal: Journal, config: Mapping[str, Any], identity: Mapping[str, Any], insist: bool = True
) -> None:
    """Raise JournalError, saying what differs, if a journal is not of the run with these settings and this identity.

    Args:
        insist: whether what is under `initial` in the identity must be the same, too.
    """
    for name, ours, theirs in (
        ("setting", config, journal.header["config"]),
        ("run", identity, journal.header["run"]),
    ):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) == theirs.get(key) or (key == "initial" and not insist):
                continue
            hint = HINTS.get(key, "")
            raise JournalError(
                f"{journal.path}: is of another run: its {name} {key!r} is {theirs.get(key)!r}, and here it is "
                f"{ours.get(key)!r}{hint}; resume with the same, or choose another folder."
            )


def recorded(journal: Journal) -> RunState:
    """Return what a journal's actions came to, without deciding anything again: no stages, whatever the version."""
    state = RunState(AutoLRSConfig.from_mapping(journal.header["config"], origin=str(journal.path)))
    for entry in journal.entries:
        if entry.result is not None:
            state.observe(entry.action, entry.result)
    return state


def plateau_of(journal: Journal) -> tuple[tuple[float, float], ...]:
    """Return (progress, learning rate) of an earlier run's plateau, as far as the next run is to follow it.

    That is wherever it changed, its warm-up and decay left out, corrected by what is known in `hindsight`. A run goes
    to a new rate over a few steps, which are one change: it is where the rate has settled.

    Raises:
        ConfigError: the run has not got past its warm-up.
    """
    state = recorded(journal)
    steps, warm = state.config.max_steps, warmup_steps(state.config)
    end = min(state.step, steps - round(DECAY * steps) if state.config.final_decay else steps)
    if end <= warm:
        raise ConfigError(
            f"warm_start={str(journal.path.parent)!r}: has taken {state.step} of {steps} steps, and nothing of its "
            "plateau yet."
        )
    points, changed = [(0, state.lrs[warm])], -steps
    for step in range(warm, end):
        if not math.isclose(state.lrs[step], points[-1][1], rel_tol=SAME):
            if step - changed <= ramp_steps(state.config):
                points.pop()
            points.append((step, state.lrs[step]))
            changed = step
    actions = [entry.action for entry in journal.entries if entry.result is not None]
    corrected = with_retreats(points, actions, state.losses)
    corrected = without_plateau(corrected, state.losses[:end], chunk_steps(steps), steps)
    return tuple((step / steps, rate) for step, rate in corrected)


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
