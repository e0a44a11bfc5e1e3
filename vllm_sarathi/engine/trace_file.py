"""The step trace on the disk: checked before a model loads, bounded in size, and no danger to the engine."""

import os
from pathlib import Path

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.engine.vllm.internals import logger

MAX_TRACE_BYTES = 64 * 2**20
"""A step trace of this size becomes FILE.jsonl.1, in place of an older one, and FILE.jsonl starts anew."""


def check_step_trace(path: str | None) -> None:
    """Check that a step trace can be written, before a model loads.

    Raises:
        ConfigError: it cannot.
    """
    if path is None:
        return
    try:
        open(path, "a").close()
    except OSError as error:
        raise ConfigError(f"--step-trace {path!r}: cannot be written ({error.strerror}).") from error


class StepTraceFile:
    """A step trace on the disk; a disk that fails ends the trace with a warning, and nothing else.

    Args:
        path: the file; what is in it stays, and new lines follow.
        max_bytes: as MAX_TRACE_BYTES.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_TRACE_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._failed = False

    def write(self, lines: list[str]) -> None:
        """Append whole lines."""
        if self._failed or not lines:
            return
        try:
            self._append("".join(lines).encode())
        except OSError as error:
            self._failed = True
            logger.warning(
                "The step trace %s ends here: it cannot be written (%s).", self.path, error.strerror
            )

    def _append(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size and size + len(data) > self._max_bytes:
                self.path.replace(f"{self.path}.1")
                return self._append(data)
            if file.write(data) < len(data):  # a full disk: leave no piece of a line
                os.ftruncate(file.fileno(), size)
                raise OSError(None, "no space left")
            return None
