"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autolrs_plugin.core.config import ConfigError


@contextmanager
def written_whole(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Give a scratch file to write to; it takes the place of `path` once it is written.

    A reader, or a run that was killed, finds the old file or the new one, never a piece.

    Args:
        path: the file.
        lasting: whether it is to outlive a loss of power, which costs a wait for the disk.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; what was there stays.
    """
    scratch = path.with_suffix(".tmp")
    try:
        yield scratch
        if lasting:
            with open(scratch, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
    if lasting:
        sync_folder(path.parent)


def check_parent(path: Path) -> None:
    """Raise ConfigError if the folder that a file is to be written in does not exist."""
    if not path.parent.is_dir():
        raise ConfigError(
            f"{str(path)!r}: there is no folder {str(path.parent)!r}; make it, or give another."
        )


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
