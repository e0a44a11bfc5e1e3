"""Traces: real arrivals and lengths, from files.

| format | columns |
| --- | --- |
| azure | TIMESTAMP (a date), ContextTokens, GeneratedTokens; CSV (Azure Public Dataset) |
| mooncake | timestamp (milliseconds), input_length, output_length, hash_ids (optional); JSON lines |
| csv | arrival_s, prompt_tokens, output_tokens; CSV, or JSON lines where the file's name ends in .jsonl |
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import ConfigError, check_choice
from vllm_sarathi.core.files import write_whole
from vllm_sarathi.simulation.workloads.requests import LONGEST_S, SimulatedRequest

FORMATS: dict[str, tuple[str, str, str]] = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "csv": ("arrival_s", "prompt_tokens", "output_tokens"),
}
"""The columns of arrival, prompt and answer."""

DEFAULT_FORMAT = "csv"
"""What commands take a trace for where nothing is said."""

TOO_LONG = ("refuse", "skip")

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
"""How files of gzip, bzip2, xz, zstd and zip begin."""


@dataclass(frozen=True)
class Trace:
    """The requests of a trace, from time 0 on, and how many were too long and left out."""

    requests: tuple[SimulatedRequest, ...]
    skipped: int


def check_no_trace(kind: str, time_scale: float) -> None:
    """Refuse what is said of a trace where there is none; the arguments are those of `read_trace`.

    Raises:
        ConfigError: something is said.
    """
    for option, said in (("--trace-format", kind != DEFAULT_FORMAT), ("--time-scale", time_scale != 1.0)):
        if said:
            raise ConfigError(f"{option}: has no effect without --trace.")


def read_trace(
    path: Path, kind: str, max_tokens: int, too_long: str = "refuse", time_scale: float = 1.0
) -> Trace:
    """Read a trace.

    Args:
        path: the file.
        kind: a name from FORMATS.
        max_tokens: the most tokens that a request may have in all.
        too_long: `refuse` a trace with a longer one, or `skip` those and count them.
        time_scale: arrival times are divided by it: 2 plays the trace twice as fast.

    Raises:
        ConfigError: the file cannot be read, or a row is wrong; the message names the row and the column.
    """
    check_choice("trace_format", kind, tuple(FORMATS))
    check_choice("too_long", too_long, TOO_LONG)
    if not (math.isfinite(time_scale) and time_scale > 0):
        raise ConfigError(f"--time-scale {time_scale!r}: must be a number above 0.")
    requests: list[SimulatedRequest] = []
    skipped, start_s, last_s = 0, None, -math.inf
    for row, values in _rows(path, kind):
        where = f"{path}, row {row}"
        time_s = _time_s(values, kind, where)
        if time_s < last_s:
            raise ConfigError(
                f"{where}: arrives before the row above it; sort the trace by {FORMATS[kind][0]}."
            )
        last_s = time_s
        start_s = time_s if start_s is None else start_s
        arrival_s = (time_s - start_s) / time_scale
        if arrival_s > LONGEST_S:
            raise ConfigError(
                f"{where}: arrives {arrival_s:.3g} s after the first; at most {LONGEST_S:g} s can be simulated."
            )
        prompt, output = (_length(values, column, where) for column in FORMATS[kind][1:])
        if prompt + output > max_tokens:
            if too_long == "refuse":
                raise ConfigError(
                    f"{where}: {prompt} + {output} tokens are more than the model's {max_tokens}; "
                    "--too-long skip leaves such requests out."
                )
            skipped += 1
            continue
        prefix = _prefix(values, where)
        requests.append(SimulatedRequest(arrival_s, prompt, output, prefix=prefix))
    if not requests:
        raise ConfigError(f"{path}: holds no request that can be served ({skipped} are too long).")
    return Trace(tuple(requests), skipped)


def write_trace(requests: Iterable[SimulatedRequest], path: Path) -> None:
    """Write requests in the format `mooncake`: what was generated here can be played elsewhere.

    Raises:
        OSError: it cannot be written.
    """
    lines = (
        {
            "timestamp": round(request.arrival_s * 1e3),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": list(request.prefix),
        }
        for request in requests
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def _rows(path: Path, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a file with their number, as an editor counts lines."""
    try:
        content = path.read_bytes()
        if content.startswith(COMPRESSED):
            raise ConfigError(
                f"--trace {path}: is a compressed file, which is not read; decompress it first."
            )
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: cannot be read ({error}).") from error
    if kind == "mooncake" or path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, row {number}: is not valid JSON ({error}).") from error
            if not isinstance(values, dict):
                raise ConfigError(f"{path}, row {number}: must be a JSON object.")
            _check_columns(values, kind, f"{path}, row {number}")
            yield number, values
        return
    reader = csv.DictReader(text.splitlines())
    columns = reader.fieldnames or ()
    _check_columns(columns, kind, str(path))
    for column in FORMATS[kind]:
        if columns.count(column) > 1:
            raise ConfigError(f"{path}: has {columns.count(column)} columns {column!r}; leave one of them.")
    for values in reader:
        if None in values:  # where DictReader has cells beyond the header's
            cells = len(columns) + len(values[None])
            raise ConfigError(
                f"{path}, row {reader.line_num}: has {cells} cells, more than the {len(columns)} columns; a number "
                "has no comma in it."
            )
        yield reader.line_num, values


def _check_columns(columns: Any, kind: str, where: str) -> None:
    for column in FORMATS[kind]:
        if column not in columns:
            raise ConfigError(
                f"{where}: has no column {column!r}; --trace-format {kind} needs {', '.join(FORMATS[kind])}."
            )


def _time_s(values: Mapping[str, Any], kind: str, where: str) -> float:
    column = FORMATS[kind][0]
    try:
        if kind == "azure":
            date = datetime.fromisoformat(str(values[column]))
            # Of a date without a zone only differences count: those of the local zone jump when its clocks change.
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        time_s = float(values[column]) / (1e3 if kind == "mooncake" else 1.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {column} {values[column]!r} is not a time.") from error
    if not math.isfinite(time_s) or time_s < 0:
        raise ConfigError(f"{where}: {column} {values[column]!r} must be a time of 0 or later.")
    return time_s


def _length(values: Mapping[str, Any], column: str, where: str) -> int:
    try:
        length = float(values[column])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {column} {values[column]!r} is not a number.") from error
    if not length.is_integer() or length < 1:
        raise ConfigError(f"{where}: {column} {values[column]!r} must be a whole number of at least 1.")
    return int(length)


def _prefix(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    pieces = values.get("hash_ids") or ()
    if not isinstance(pieces, list | tuple) or not all(isinstance(p, int) and p >= 0 for p in pieces):
        raise ConfigError(f"{where}: hash_ids {pieces!r:.80} must be a list of whole numbers.")
    return tuple(pieces)
