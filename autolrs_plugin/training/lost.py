"""What was changed for good by something that should have left no trace: named, with what works instead."""

import itertools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from autolrs_plugin.training.flags import FLAG

logger = logging.getLogger("autolrs_plugin")

LOG = " (a list that grows)"
"""Ends the name of a list of numbers that only grows, a log: it stays, and is told of."""

ORDER = " (the order of a set)"
"""Ends the name of the order in which one iterates over a set, which one that is filled again may not have."""

POPPED = " (a set, by pop())"
"""Ends the name of the place at which a set's pop() goes on."""

FROZEN = " (a frozen weight)"
"""Ends the name of a weight that nobody trains."""

SHOWN = 5
"""Most things that are named at once."""

SWITCHES = (
    *("torch.get_", "torch.is_", "torch.are_", "torch.backends."),
    *("numpy.get", "decimal.get", "os.get"),
)
"""Begin the names of settings of the process or the thread."""

INSTEAD = {
    POPPED: "What a set's pop() takes depends on how often it was called before; take from a list or a deque, or what "
    "min() gives.",
    FROZEN: "A weight that was frozen when the search began is not copied; where a step lets it train "
    "(requires_grad_(), add_param_group()), give the module that it belongs to as stateful={'layers': module}.",
    " (a generator)": "Nobody can set a generator (a function with yield) back: write it as a class with __next__(), "
    "whose attributes say how far it is; or give what batches are drawn from as train_data=.",
    " (a Connection)": "A database of sqlite3 is set back where it lies in memory and no transaction is open: "
    "commit() before train_step returns, and keep in memory what a step writes.",
}
"""What works instead, by what the name of a thing ends with."""

_LEFT = {
    LOG: "{0}: grew in {1}, and was not set back, as {2}, too; keep what training depends on in the model or in an "
    "object with state_dict(), given as stateful=.",
    ORDER: "{0}: is another one after {1}, with the same members; iterate over sorted(...) where the order matters.",
    FLAG: "{0}: was set or let go in {1}, and stays so, for another thread or process may have done that; where "
    "train_step or validate goes by what it has set itself, keep a plain attribute there, which is set back.",
}
"""What stays changed, by what its names end with, and the warning: of what, by what, and how that comes."""

IN_GENERAL = (
    "Give what batches are drawn from as train_data= or data=, and other state as stateful= (a module, an optimizer, "
    "or an object with state_dict() and load_state_dict())."
)


def check_replaced(counts: Sequence[Any]) -> None:
    """See that nobody holds counts that others have taken the place of.

    Raises:
        RuntimeError: somebody does.
    """

    def references(things: Sequence[Any]) -> list[int]:
        return [sys.getrefcount(thing) for thing in things]

    (usual,) = references([itertools.count()])
    for count, found in zip(counts, references(counts), strict=True):
        if found > usual:
            raise RuntimeError(
                f"itertools.{count!r}: was advanced, and is held by something that AutoLRS does not reach, too, where "
                "it cannot be set back; keep it in one place that train_step reaches, or count with a number."
            )


def check_same(
    before: Mapping[str, str], after: Mapping[str, str], named: Collection[str] = (), by: str = "a probe"
) -> set[str]:
    """Look at what was changed for good; return what of it stays so, of which a warning tells once.

    Args:
        before: a digest of everything, by the path to it.
        after: the same afterwards.
        named: what has been told of before.
        by: what may have changed something: `a probe` or `an evaluation`.

    Raises:
        RuntimeError: it changed something of the job; the message names it.
    """
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    left: set[str] = set()
    for ending, warning in _LEFT.items():
        found = {path for path in changed if path.endswith(ending)}
        left |= found
        if fresh := sorted(found.difference(named)):
            calls = "probes call train_step" if by == "a probe" else "AutoLRS calls validate"
            logger.warning(warning.format(", ".join(fresh[:SHOWN]), by, calls))
    if lost := [path for path in changed if path not in left]:
        advice = [text for ending, text in INSTEAD.items() if any(path.endswith(ending) for path in lost)]
        if any(path.startswith(SWITCHES) for path in lost):
            where = "train_step" if by == "a probe" else "validate"
            advice.append(
                f"Set it back in {where}, or use a with statement, such as `with torch.no_grad():`."
            )
        raise RuntimeError(
            f"{', '.join(lost[:SHOWN])}: was changed by {by} and cannot be set back, so the run would differ from one "
            f"without {by.partition(' ')[2]}s. {' '.join(advice or [IN_GENERAL])}"
        )
    return left
