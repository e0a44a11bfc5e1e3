"""The kept state of a job: in host memory, on its device or on disk; and its states as files."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from autolrs_plugin.training.checkpoint import (
    checkpoint_bytes,
    checkpoint_from_bytes,
    read_checkpoint,
    write_checkpoint,
)
from autolrs_plugin.training.snapshot import JobState
from autolrs_plugin.training.tree import Copier

PLACES = ("host", "device", "disk")


class Keeper:
    """Keeps one state of a job to go back to.

    Args:
        job: the job.
        place: where the state is kept: `host` memory, the tensors' own `device`, or `disk` (a temporary file).

    Raises:
        ValueError: `place` is none of these.
    """

    def __init__(self, job: JobState, place: str = "host") -> None:
        if place not in PLACES:
            raise ValueError(f"keep={place!r}: unknown; valid: {', '.join(PLACES)}.")
        self._job = job
        self._place = place
        self._kept: dict[str, Any] | None = None
        self._file: tuple[Path, str] | None = None
        # Beside a file of this process: its own objects, and what they hold.
        self._held: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def save(self) -> None:
        """Keep the state now, in place of the one kept before."""
        if self._place == "disk":
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="autolrs-")
            path = Path(self._folder.name) / "kept.safetensors"
            self._file = path, self.write(path)
            self._held = self._job.held()
            return
        device = torch.device("cpu") if self._place == "host" else None
        self._kept = self._job.capture(Copier(device), old=self._kept)

    def restore(self) -> None:
        """Go back to the kept state.

        Raises:
            RuntimeError: none is kept yet.
        """
        if self._kept is None and self._file is None:
            raise RuntimeError("restore(): no state is kept yet; perform a Snapshot first.")
        if self._file is None:
            self._job.restore(self._kept)  # type: ignore[arg-type]
            return
        self._job.restore(read_checkpoint(*self._file) | self._held)

    def kept(self) -> bytes:
        """Return the kept state as the content of a file."""
        if self._file is not None:
            return self._file[0].read_bytes()
        assert self._kept is not None, "nothing is kept yet"
        return checkpoint_bytes(self._kept)

    def keep(self, data: bytes) -> None:
        """Make the state that `kept` gave, in this or another process, the kept one."""
        self._kept, self._file, self._held = checkpoint_from_bytes(data), None, {}

    def drop(self) -> None:
        """Let go of the kept state."""
        self._kept, self._file, self._held = None, None, {}
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def write(self, path: Path) -> str:
        """Write the state now to a file; return its SHA-256."""
        return write_checkpoint(self._job.capture(Copier(share=True)), path)

    def read(self, path: Path, sha256: str) -> None:
        """Go to the state that a file holds."""
        self._job.restore(read_checkpoint(path, sha256))

    def keep_file(self, path: Path, sha256: str) -> None:
        """Make the state that a file holds the kept one, and leave what the job holds as it is."""
        before = self._job.glance()
        self.read(path, sha256)
        # A file says only what is not as it was at first: what changes from now on it does not know.
        self.save()
        self._job.restore(before)
