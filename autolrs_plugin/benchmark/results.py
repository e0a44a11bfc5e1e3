"""Result files: `{"schema": 1, "rows": [...]}`, whatever the benchmark."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autolrs_plugin.core.files import written_whole

SCHEMA = 1


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows to a file, and the folder that it is in; who reads it meanwhile finds the old file or the new one.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is not finite, for which JSON has no word.
    """
    text = json.dumps({"schema": SCHEMA, "rows": list(rows)}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, lasting=False) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")
