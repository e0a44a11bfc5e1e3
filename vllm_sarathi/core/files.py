"""Files that appear whole or not at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, lasting: bool = True) -> None:
    """Write to `path` so that a reader, or a crash, finds the old file or the new one, never a piece.

    Args:
        path: the file.
        content: what is to be in it; text is written as UTF-8.
        lasting: whether it is to outlive a crash of the machine, which costs a wait for the disk.

    Raises:
        OSError: the folder is not there or cannot be written to, or the disk is full; what was there stays.
    """
    handle, scratch = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
