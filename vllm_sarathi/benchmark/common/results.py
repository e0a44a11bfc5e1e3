"""Result files: `{"schema": 1, "rows": [...]}`, whatever the benchmark; some say more under other keys.

`vllm-sarathi demo` alone has `runs` in place of rows.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_sarathi.core.files import write_whole

SCHEMA = 1


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path | None, **more: Any) -> None:
    """Write rows and `more` to a file, if one is named; who reads it meanwhile finds the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        return
    write_results(path, **more, rows=list(rows))


def write_results(path: Path, **content: Any) -> None:
    """Write a file of this schema, and the folder that it is in.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"schema": SCHEMA, **content}, indent=2) + "\n")
