"""Databases of sqlite3: one in memory is set back, one in a file, or amid a transaction, is watched.

A connection is reached through its cursors as well. Nothing here opens a transaction.
"""

import contextlib
import gc
import sys
import zlib
from typing import Any

from autolrs_plugin.training.slots import Slots

MOST_BYTES = 2**24
"""A larger database is watched."""

_VERSIONS = (slice(60, 64), slice(68, 72))
"""Where in a database there are numbers that its user may set: its version, and that of the application."""

_LOOKS = slice(40, 44)
"""Where there is the number of the version that statements are compiled for: it rises with each change, ours, too."""


def is_database(value: Any) -> bool:
    """Tell whether a value is a connection of sqlite3."""
    return _is(value, "Connection")


def is_cursor(value: Any) -> bool:
    """Tell whether a value is a cursor of sqlite3."""
    return _is(value, "Cursor")


def rows_left(cursor: Any) -> bool:
    """Tell whether a cursor may have rows left to be fetched: where among them it is, nobody can tell."""
    statement = any(type(part).__name__ == "Statement" for part in gc.get_referents(cursor))
    return statement and cursor.description is not None


class DatabaseSlots(Slots):
    """The content of a database that lies in memory, as long as no transaction is open."""

    NAME = "content"

    def __init__(self, owner: Any, kind: str) -> None:
        super().__init__(owner, kind)

    def get(self) -> dict[str, Any]:
        """Return the content, where it can be set back."""
        content = content_of(self._owner)
        return {} if content is None else {self.NAME: content}

    def set(self, name: str, value: Any) -> None:
        """Write the content; where that is not possible, it is seen afterwards to be another."""
        sqlite3 = sys.modules["sqlite3"]
        now = content_of(self._owner)
        if now is None or now == value:
            return
        # Not deserialize(), which would cut the connection off from others to the same memory, and bound its growth.
        with contextlib.closing(sqlite3.connect(":memory:")) as kept, contextlib.suppress(sqlite3.Error):
            if value:
                kept.deserialize(value)
            kept.backup(self._owner)

    def delete(self, name: str) -> None:
        """Leave it: there is always a content."""


def content_of(connection: Any) -> bytes | None:
    """Return the content of a database that can be set back, nothing of an empty one; None of all others."""
    try:
        return _content_of(connection)
    except (
        sys.modules["sqlite3"].Error,
        AttributeError,
    ):  # closed, of another thread, in use; no serialize()
        return None


def _content_of(connection: Any) -> bytes | None:
    if connection.in_transaction or _places_of(connection) != [""]:
        return None
    ((pages,),) = _rows(connection, "PRAGMA page_count")
    if not pages:  # of which there is nothing to serialize
        return b""
    content = connection.serialize()
    if len(content) > MOST_BYTES:
        return None
    before, after = content[: _LOOKS.start], content[_LOOKS.stop :]
    return b"" if _is_empty(connection, content) else before + bytes(4) + after


def database_seen(connection: Any) -> Any:
    """Return what tells whether a database has changed: of one that can be set back, its content."""
    content = content_of(connection)
    if content is not None:
        return zlib.crc32(content)
    try:
        seen = [connection.total_changes, connection.in_transaction]
    except sys.modules["sqlite3"].Error:
        return "closed"
    with contextlib.suppress(sys.modules["sqlite3"].Error):  # of another thread
        seen += _places_of(connection)
    return seen


def _places_of(connection: Any) -> list[str]:
    """Return the file of each database of a connection, nothing for one in memory."""
    return [str(file or "") for _, _, file in _rows(connection, "PRAGMA database_list")]


def _is_empty(connection: Any, content: bytes) -> bool:
    """Tell whether there is nothing in a database: what has been emptied, or set back to nothing, has a page."""
    nothing = _rows(connection, "SELECT count(*) FROM sqlite_master") == [(0,)]
    return nothing and not any(any(content[where]) for where in _VERSIONS)


def _rows(connection: Any, query: str) -> list[Any]:
    cursor = sys.modules["sqlite3"].Cursor(connection)
    cursor.row_factory = None  # the user's may make anything of a row
    return list(cursor.execute(query))


def _is(value: Any, name: str) -> bool:
    module = sys.modules.get("sqlite3")  # whoever has one has imported it; not every Python has it
    return module is not None and isinstance(value, getattr(module, name))
