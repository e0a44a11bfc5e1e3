"""The rows of the live benchmark: one per workload, SLO and scheduler, in the public result format."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_sarathi.benchmark.common.results import SCHEMA, write_rows
from vllm_sarathi.benchmark.live.contenders import Contender
from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.streams import StreamRecord

Row = dict[str, Any]


def attainment(records: Sequence[StreamRecord], tbt_slo_ms: float) -> float | None:
    """The share of all gaps between tokens that are within the SLO; None where there is no gap."""
    gaps_s = [gap for record in records for gap in record.gaps_s]
    if not gaps_s:
        return None
    return sum(gap * 1e3 <= tbt_slo_ms for gap in gaps_s) / len(gaps_s)


def build_row(workload: str, tbt_slo_ms: float, contender: Contender, records: Sequence[StreamRecord]) -> Row:
    """Return a row, judged by one SLO."""
    return {
        "workload": workload,
        "tbt_slo_ms": tbt_slo_ms,
        "scheduler": contender.label,
        "token_budget": contender.token_budget,
        "attainment": attainment(records, tbt_slo_ms),
        **summarise_streams(records),
    }


class RowFile:
    """Rows as they come, and a file that always holds all of them so far.

    Args:
        path: the file; None for none.
        keep: whether the rows that the file holds already stay, but for those that come anew.
        scale: what the file says under that key, `Scale.about`; None for workloads as written, and no key.

    Raises:
        RuntimeError: the rows of the file are to be kept, and it holds something else, or they are of another scale.
    """

    def __init__(self, path: Path | None, keep: bool, scale: dict[str, Any] | None = None) -> None:
        self._path = path
        self._more = {} if scale is None else {"scale": scale}
        self._rows: dict[tuple[str, float, str], Row] = {}
        if path is not None and keep and path.exists():
            try:
                held = json.loads(path.read_text())
                if held["schema"] != SCHEMA:
                    raise ValueError(f"schema {held['schema']!r}")
                self._take(held["rows"])
                factors = _factors(held.get("scale"))
            except (ValueError, KeyError, TypeError) as error:
                raise RuntimeError(
                    f"--json {str(path)!r}: holds no rows of this benchmark to resume from."
                ) from error
            if factors != _factors(scale):
                raise RuntimeError(
                    f"--json {str(path)!r}: its rows are of another --scale, or as measured on another device."
                )

    def _take(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._rows[row["workload"], row["tbt_slo_ms"], row["scheduler"]] = row

    @property
    def rows(self) -> list[Row]:
        """All rows so far, by workload and SLO, in the order in which they came."""
        places = {workload: i for i, workload in enumerate(dict.fromkeys(key[0] for key in self._rows))}
        return sorted(self._rows.values(), key=lambda row: (places[row["workload"]], row["tbt_slo_ms"]))

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in, and write the file."""
        self._take(rows)
        write_rows(self.rows, self._path, **self._more)


def _factors(scale: dict[str, Any] | None) -> Any:
    return None if scale is None else scale["factors"]
