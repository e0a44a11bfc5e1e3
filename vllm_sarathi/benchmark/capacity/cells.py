"""Tables whose rows take minutes each: a finished row is kept in a file of its own, and a later run goes on there."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vllm_sarathi import __version__
from vllm_sarathi.core.files import write_whole

Row = dict[str, Any]


class Cell(Protocol):
    """What a row is measured from."""

    @property
    def name(self) -> str:
        """A name for its file, from all that decides its answer."""
        ...


AnyCell = TypeVar("AnyCell", bound=Cell)


def name_of(*parts: Any) -> str:
    """Return a name for a file, from plain values that decide what is in it."""
    text = json.dumps([__version__, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def run_cells(
    cells: Sequence[AnyCell],
    measure: Callable[[AnyCell], Row],
    folder: Path,
    run_all: Callable[..., list[Row]],
    order: Callable[[AnyCell], float] | None = None,
    finished: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Return the rows of all cells, in their order; those that an earlier run finished are read from its files.

    Args:
        cells: what to measure.
        measure: returns a cell's row; of a module, other processes import it.
        folder: keeps a file for each finished cell.
        run_all: `farm.run_all` with all but its first two arguments and `done`.
        order: those with the least are begun first; None begins them in their order.
        finished: told of all rows that are there, as each one comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {cell.name: row for cell in cells if (row := _kept(folder / f"{cell.name}.json")) is not None}
    left = [cell for cell in cells if cell.name not in rows]
    if order is not None:
        left.sort(key=order)

    def keep(index: int, row: Row) -> None:
        name = left[index].name
        write_whole(folder / f"{name}.json", json.dumps(row) + "\n")
        rows[name] = row
        finished([rows[cell.name] for cell in cells if cell.name in rows])

    if left:
        for cell, row in zip(left, run_all(measure, left, done=keep), strict=True):
            rows[cell.name] = row
    return [rows[cell.name] for cell in cells]


def _kept(path: Path) -> Row | None:
    """Return a finished cell's row; None where there is none, or the file is not one of ours."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "table" in row else None
