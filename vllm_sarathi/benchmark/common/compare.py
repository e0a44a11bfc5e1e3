"""Two sets of result files side by side: the ratio of each figure, and the noise of that ratio.

A set is a result file, or a folder of them; files of one name below a folder are repeats of one benchmark. What is in
a folder without a schema, such as the raw results of clients, is passed over. A row's texts and its settings (SETTINGS)
say what was measured, and its other numbers are figures. Rows that differ in nothing but their seed are repeats.

    ratio   mean of the new repeats / mean of the old ones
    noise   its standard error, ratio x sqrt(v_old^2 / n_old + v_new^2 / n_new), v being the repeats' standard deviation
            over their mean. A side with one run takes the v of the other; with one run on each side nothing is known.

A figure has changed where the ratio is more than CLEARLY standard errors away from 1.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.common.results import SCHEMA
from vllm_sarathi.core.config import ConfigError

SETTINGS = frozenset(
    {
        "actors",
        "chat_requests",
        "prompt_tokens",
        "published",
        "rate_qps",
        "requests",
        "running",
        "steps",
        "tbt_slo_ms",
        "token_budget",
        "ttft_slo_ms",
        "waiting",
        "workers",
    }
)
"""Numbers of a row that say what was measured."""

REPEATS = frozenset({"seed", "repeat"})
"""Numbers of a row that say which repeat it is."""

ABOUT_THE_FILE = frozenset({"schema", "commands"})
"""What a file says of itself: in one without rows, no part of what it holds."""

SHOWN = 3
"""How many rows of a benchmark, figures of a row and files are named before the rest is counted."""

CLEARLY = 2.0

Key = tuple[str, str, str]
"""The benchmark (the file's name in a folder, else nothing), what the row is of, and the figure's name."""


@dataclass(frozen=True)
class Compared:
    """One figure, old and new.

    Attributes:
        benchmark, row, figure: as in Key.
        old, new: means over the repeats.
        ratio: new over old; None where one of them is not above 0.
        noise: standard error of the ratio; None where no repeats tell it.
    """

    benchmark: str
    row: str
    figure: str
    old: float
    new: float
    ratio: float | None
    noise: float | None

    @property
    def changed(self) -> bool | None:
        """Whether old and new differ by more than noise; None where that is not known."""
        if self.ratio is None or self.noise is None:
            return None
        return abs(self.ratio - 1.0) > CLEARLY * self.noise


def read_figures(path: Path, skipped: list[Path] | None = None) -> dict[Key, list[float]]:
    """Return the figures in a result file or a folder of them, each with its repeats.

    Args:
        path: the file or the folder.
        skipped: gets the files in the folder that have no schema, and are no results.

    Raises:
        ConfigError: the path or a file cannot be read, holds no results of this schema, or there is no file.
    """
    folder = path.is_dir()
    held = {file: _read(file) for file in (sorted(path.rglob("*.json")) if folder else [path])}
    if folder:
        other = [file for file, content in held.items() if not _has_schema(content)]
        held = {file: content for file, content in held.items() if file not in other}
        if skipped is not None:
            skipped += other
    if not held:
        raise ConfigError(f"{path}: holds no result file (*.json of schema {SCHEMA}).")
    figures: dict[Key, list[float]] = {}
    for file, content in held.items():
        for key, value in figures_of(file.stem if folder else "", _rows(file, content)):
            figures.setdefault(key, []).append(value)
    return figures


def figures_of(benchmark: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Key, float]]:
    """Yield the figures of a benchmark's rows."""
    for row in rows:
        what = ", ".join(f"{name} {value}" for name, value in settings_of(row))
        for name, value in _numbers(row):
            yield (benchmark, what, name), value


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{file}: is not valid JSON ({error}).") from error


def _has_schema(content: Any) -> bool:
    return isinstance(content, dict) and "schema" in content


def _rows(file: Path, content: Any) -> list[Mapping[str, Any]]:
    if not _has_schema(content) or content["schema"] != SCHEMA:
        raise ConfigError(f"{file}: holds no results of schema {SCHEMA}.")
    whole = {name: value for name, value in content.items() if name not in ABOUT_THE_FILE}
    rows = content.get("rows", [whole])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file}: 'rows' must be a list of JSON objects.")
    return rows


def settings_of(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what says what a row is of: its texts and its settings."""
    for name, value in row.items():
        if isinstance(value, str | bool) or (name in SETTINGS and value is not None):
            yield name, value


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield each figure of a row, those of nested objects by their path."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and name not in REPEATS and name not in SETTINGS:
            yield prefix + name, float(value)


def compare_figures(old: Mapping[Key, list[float]], new: Mapping[Key, list[float]]) -> list[Compared]:
    """Return the figures that are in both, in the order of the old ones.

    Raises:
        ConfigError: there is none.
    """
    compared = [_compared(key, old[key], new[key]) for key in old if key in new]
    if not compared:
        raise ConfigError(
            "the two have no figure in common; compare results of the same benchmark, two files or two folders."
        )
    return compared


@dataclass(frozen=True)
class Alone:
    """A row on one side of which figures are not on the other.

    Attributes:
        benchmark, row: as in Key.
        figures: their names.
        whole: whether the other side has nothing of that benchmark.
    """

    benchmark: str
    row: str
    figures: tuple[str, ...]
    whole: bool


def alone(ours: Iterable[Key], theirs: Iterable[Key]) -> list[Alone]:
    """Return what is on our side alone, row by row."""
    there = frozenset(theirs)
    known = {benchmark for benchmark, _, _ in there}
    rows: dict[tuple[str, str], list[str]] = {}
    for key in ours:
        if key not in there:
            rows.setdefault(key[:2], []).append(key[2])
    return [Alone(*row, tuple(figures), row[0] not in known) for row, figures in rows.items()]


def alone_lines(side: str, rows: list[Alone]) -> list[str]:
    """Return what is on one side alone in lines for people: one for all, and one for each benchmark."""
    figures = sum(len(row.figures) for row in rows)
    if not rows:
        return [f"in {side} alone: nothing"]
    lines = [f"in {side} alone: {_counted(figures, 'figure')} in {_counted(len(rows), 'row')}"]
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        group = [row for row in rows if row.benchmark == benchmark]
        if group[0].whole and benchmark:
            lines.append(f"  {benchmark}: all of its {_counted(len(group), 'row')}")
            continue
        named = [f"{row.row or 'a row'} ({listed(row.figures)})" for row in group]
        lines.append(f"  {benchmark + ': ' if benchmark else ''}{listed(named, '; ')}")
    return lines


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first SHOWN of some names, and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _compared(key: Key, old: list[float], new: list[float]) -> Compared:
    before, after = statistics.fmean(old), statistics.fmean(new)
    ratio = after / before if before > 0 and after > 0 else None
    return Compared(*key, before, after, ratio, None if ratio is None else _noise(ratio, old, new))


def _noise(ratio: float, old: list[float], new: list[float]) -> float | None:
    spreads = [
        statistics.stdev(values) / abs(statistics.fmean(values)) if len(values) > 1 else None
        for values in (old, new)
    ]
    known = [spread for spread in spreads if spread is not None]
    if not known:
        return None
    shares = [
        (known[0] if spread is None else spread) ** 2 / len(values)
        for spread, values in zip(spreads, (old, new), strict=True)
    ]
    return ratio * math.sqrt(sum(shares))


def compare_table(rows: list[Compared]) -> Table:
    """Return the figures as a table, the largest change first; it can be read in 80 columns."""
    table = Table("figure", box=None)
    for name in ("old", "new", "new / old", "noise", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    said = {True: "yes", False: "no", None: "?"}
    for row in sorted(rows, key=_rank):
        table.add_row(
            ": ".join(part for part in (row.benchmark, row.figure, row.row) if part),
            f"{row.old:.4g}",
            f"{row.new:.4g}",
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "-" if row.noise is None else f"± {row.noise:.3f}",
            said[row.changed],
        )
    return table


def _rank(row: Compared) -> tuple[bool, float]:
    """What has no ratio and has changed, such as a count that was 0, comes first: no ratio is larger."""
    if row.ratio is not None:
        return True, -abs(math.log(row.ratio))
    return row.new == row.old, -abs(row.new - row.old)


def to_rows(rows: list[Compared]) -> list[dict[str, Any]]:
    """Return the figures as the rows of a result file."""
    return [asdict(row) | {"changed": row.changed} for row in rows]
