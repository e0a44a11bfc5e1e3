"""Journal: every action of a run and its result, so that a killed job goes on at the same action.

A file of lines, each a JSON object with a checksum over itself and all lines before it:

    {"config": ..., "kind": "header", "run": ..., "version": 2, "sha256": ...}
    {"action": {"kind": "Train", ...}, "books": {...}, "kind": "intent", "sha256": ...}   before an action takes effect
    {"kind": "result", "result": {...}, "checkpoint": {...}, "sha256": ...}       after it
    {"kind": "progress", "losses": [...], "sha256": ...}                          or, during it, the steps so far

A line is written before anything else happens, and is safe from a kill from then on; one that took work is on the
disk by then, safe from a loss of power. A last line without its end is one that was cut off: it is dropped, and its
action repeated. Anything else that does not fit its checksum is refused.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.files import written_whole

VERSION = 2
FILE_NAME = "journal.jsonl"

_ACTIONS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Snapshot, Probe, Restore, Train, Evaluate, Done)
}


class JournalError(RuntimeError):
    """A journal that cannot be used: of another run or version, corrupted, or in use."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of the run's own stream on disk.

    Attributes:
        file: its name, beside the journal.
        sha256: of the whole file.
    """

    file: str
    sha256: str


@dataclass(slots=True)
class Entry:
    """An action, and what came of it.

    Attributes:
        action: the action.
        result: its result; None while it has none.
        checkpoint: the state after it, if it changed the state of the run's own stream.
        books: what deciding and bookkeeping had taken before it, in seconds, by the ledger's names for them.
        losses: of the steps taken so far, where it was noted during the action.
    """

    action: Action
    result: Result | None = None
    checkpoint: Checkpoint | None = None
    books: Mapping[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


_HELD: "WeakSet[Journal]" = WeakSet()
"""The journals that this process holds for writing."""


class Journal:
    """The journal of one run, open for writing by one process at a time.

    Attributes:
        path: the file.
        header: what the run is: `config` (plain settings), `run` (its identity), `checkpoint` (its first state).
        entries: all actions in order; only the last may be without a result.
    """

    def __init__(self, path: Path, header: dict[str, Any], entries: list[Entry], chain: str) -> None:
        """Take over a journal that is on the disk; use `create` or `open`."""
        self.path = path
        self.header = header
        self.entries = entries
        self._chain = chain
        self._length = 0
        self._file: IO[bytes] | None = None

    @classmethod
    def create(
        cls, path: Path, config: Mapping[str, Any], run: Mapping[str, Any], checkpoint: Checkpoint
    ) -> "Journal":
        """Begin a journal; a file that is there already is an error.

        Args:
            config: the run's settings, as plain values.
            run: what tells this run from others, as plain values.
            checkpoint: the state before the first action.

        Raises:
            JournalError: `path` is there already, or cannot be written.
        """
        if path.exists():
            raise JournalError(f"{path}: is there already.")
        line, chain = _sealed(_header(config, run, checkpoint), "")
        try:
            with written_whole(path) as scratch:
                scratch.write_bytes(line)
        except OSError as error:
            raise _unwritten(path, error) from error
        # Through JSON once, so that a header is the same whether written or read.
        journal = cls(path, json.loads(line), [], chain)
        journal._hold(len(line))
        return journal

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Read a journal and hold it for writing; a line that a kill cut off is dropped from the file.

        Raises:
            JournalError: it cannot be read, is corrupted, of another version, or in use by another process.
        """
        journal, length = _read(path)
        journal._hold(length)
        return journal

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Read a journal without holding it: to look at a run, also while it is going on.

        Raises:
            JournalError: it cannot be read, is corrupted, or of another version.
        """
        return _read(path)[0]

    @property
    def unfinished(self) -> Action | None:
        """The action that was begun and has no result."""
        return self.entries[-1].action if self.entries and self.entries[-1].result is None else None

    def intend(self, action: Action, books: Mapping[str, float] | None = None) -> None:
        """Note an action before it takes effect; one that was begun already (and is repeated) is noted once."""
        if self.unfinished is not None:
            assert self.unfinished == action, f"{action} while {self.unfinished} has no result"
            return
        entry = Entry(action, books=dict(books or {}))
        self._append(_intent(entry), sync=False)
        self.entries.append(entry)

    def complete(self, result: Result, checkpoint: Checkpoint | None = None) -> None:
        """Note the result of the action begun, and the checkpoint of the state after it."""
        assert self.unfinished is not None, "a result without an action"
        line: dict[str, Any] = {"kind": "result", "result": _outcome(result)}
        if checkpoint is not None:
            line["checkpoint"] = _plain(checkpoint)
        self._append(line, sync=bool(result.losses) or result.val_loss is not None)
        self.entries[-1].result = result
        self.entries[-1].checkpoint = checkpoint

    def results(self) -> list[Result]:
        """Return the results so far, in order."""
        return [entry.result for entry in self.entries if entry.result is not None]

    def keep_only(self, names: set[str]) -> None:
        """Delete the states beside the journal that are none of `names`; each rank's part has its state's name."""
        for path in self.path.parent.glob("state-*"):
            if state_name(path.name) not in names:
                path.unlink()

    def close(self) -> None:
        """Let other processes write."""
        if self._file is not None:
            if sys.platform != "win32":
                import fcntl

                # Worker processes of a loader may have inherited the file, and with it the lock.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None
        _HELD.discard(self)

    def _hold(self, length: int) -> None:
        # Without a buffer: what of a line a full disk did not take must not come after all later.
        self._file = open(self.path, "rb+", buffering=0)  # noqa: SIM115  # held until close()
        if sys.platform != "win32":
            import fcntl  # not on Windows, where the file is not locked

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.close()
                # By the open files: a relative path may lead elsewhere by now.
                there = os.stat(self.path)
                held = [other._file for other in _HELD if other._file is not None]
                here = any(os.path.samestat(os.fstat(file.fileno()), there) for file in held)
                raise JournalError(
                    f"{self.path}: an AutoLRS of this process is writing this run; close() that first."
                    if here
                    else f"{self.path}: another process is writing this run."
                ) from error
        _HELD.add(self)
        self._cut(length)

    def _cut(self, length: int) -> None:
        assert self._file is not None, "the journal is closed"
        self._file.truncate(length)
        self._file.seek(length)
        self._length = length

    def _append(self, body: dict[str, Any], sync: bool) -> None:
        assert self._file is not None, "the journal is closed"
        line, chain = _sealed(body, self._chain)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._cut(self._length)
            raise _unwritten(self.path, error) from error
        self._chain = chain
        self._length += len(line)


def journal_text(config: Mapping[str, Any], run: Mapping[str, Any], entries: Iterable[Entry]) -> str:
    """Return a whole journal as text: for a framework that keeps it in checkpoints of its own."""
    bodies = [_header(config, run, None)]
    for entry in entries:
        bodies.append(_intent(entry))
        if entry.result is not None:
            bodies.append({"kind": "result", "result": _outcome(entry.result)})
        elif entry.losses:
            bodies.append({"kind": "progress", "losses": _number(entry.losses)})
    lines, chain = [], ""
    for body in bodies:
        line, chain = _sealed(body, chain)
        lines.append(line.decode())
    return "".join(lines)


def read_text(text: str, origin: str) -> Journal:
    """Read what `journal_text` gave; it cannot be written to. `origin` names its source in errors.

    Raises:
        JournalError: it is corrupted, or of another version.
    """
    return parsed(Path(origin), text.encode())[0]


def action_to_mapping(action: Action) -> dict[str, Any]:
    """Return an action as plain values; `action_from_mapping` takes them back."""
    return {"kind": type(action).__name__, **_plain(action)}


def action_from_mapping(values: Mapping[str, Any]) -> Action:
    """Return the action that `action_to_mapping` gave as plain values."""
    action: Action = _built(_ACTIONS[values["kind"]], {k: v for k, v in values.items() if k != "kind"})
    return action


def _unwritten(path: Path, error: OSError) -> JournalError:
    return JournalError(
        f"{path}: cannot be written ({error.strerror}), and what it holds is whole; make room on that disk."
    )


def _plain(value: Any) -> dict[str, Any]:
    """Return a dataclass of numbers, strings and tuples of floats as JSON."""
    return {f.name: _number(getattr(value, f.name)) for f in fields(value)}


def _outcome(result: Result) -> dict[str, Any]:
    """Return a result as JSON; whether it was stopped only where it was."""
    return {name: value for name, value in _plain(result).items() if name != "stopped" or value}


def _number(x: Any) -> Any:
    """Return a value as JSON, which has no infinity, no NaN and no tuple."""
    if isinstance(x, tuple):
        return [_number(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _from_number(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(_from_number(v) for v in x)
    return float(x) if x in ("inf", "-inf", "nan") else x


def _built(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{name: _from_number(value) for name, value in values.items()})


def _header(
    config: Mapping[str, Any], run: Mapping[str, Any], checkpoint: Checkpoint | None
) -> dict[str, Any]:
    header = {"kind": "header", "version": VERSION, "config": dict(config), "run": dict(run)}
    if checkpoint is not None:
        header["checkpoint"] = _plain(checkpoint)
    return header


def _intent(entry: Entry) -> dict[str, Any]:
    return {"kind": "intent", "action": action_to_mapping(entry.action), "books": dict(entry.books)}


def _sealed(body: dict[str, Any], chain: str) -> tuple[bytes, str]:
    """Return `body` as a line with its checksum, and that checksum; `chain` is the one of the line before."""
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    sha256 = hashlib.sha256((chain + text).encode()).hexdigest()
    # The checksum comes last, whatever the keys are called.
    return f'{text[:-1]}, "sha256": "{sha256}"}}\n'.encode(), sha256


def _read(path: Path) -> tuple[Journal, int]:
    """Return the journal and how many bytes of its file are whole lines."""
    try:
        return parsed(path, path.read_bytes())
    except OSError as error:
        raise JournalError(f"{path}: cannot be read ({error.strerror}).") from error


def parsed(path: Path, data: bytes) -> tuple[Journal, int]:
    """Return the journal in the content of a file, and how many bytes of that are whole lines.

    Raises:
        JournalError: it is corrupted, or of another version.
    """
    *lines, rest = data.split(b"\n")
    chain, bodies = "", []
    for number, line in enumerate(lines, start=1):
        body, chain = _opened(path, number, line, chain)
        bodies.append(body)
    # What a kill cut off is the beginning of a line. A whole line and a wrong byte in place of its end is damage.
    if rest and _is_sealed(rest[:-1], chain):
        raise JournalError(f"{path}: line {len(lines) + 1} is corrupted; nothing of this journal is used.")
    if not bodies:
        raise JournalError(f"{path}: is no journal: it has no whole line.")
    journal = Journal(path, bodies[0], [], chain)
    for number, body in enumerate(bodies[1:], start=2):
        _take(journal, body, number)
    return journal, len(data) - len(rest)


def _opened(path: Path, number: int, line: bytes, chain: str) -> tuple[dict[str, Any], str]:
    """Return a line's body and checksum.

    Raises:
        JournalError: the line is corrupted, or a header of another version.
    """
    if not _is_sealed(line, chain):
        raise JournalError(f"{path}: line {number} is corrupted; nothing of this journal is used.")
    body: dict[str, Any] = json.loads(line)
    if number == 1 and body.get("version") != VERSION:
        raise JournalError(
            f"{path}: is of version {body.get('version')!r}; this is version {VERSION}: go on with the release of "
            "autolrs_plugin that wrote it, or choose another folder."
        )
    return body, body["sha256"]


def _is_sealed(line: bytes, chain: str) -> bool:
    try:
        body = json.loads(line)
    except ValueError:
        return False
    if not isinstance(body, dict):
        return False
    content = {key: value for key, value in body.items() if key != "sha256"}
    try:
        return _sealed(content, chain)[0] == line + b"\n"
    except ValueError:  # a NaN, which JSON has not and Python reads
        return False


def _take(journal: Journal, body: dict[str, Any], number: int) -> None:
    checkpoint = body.get("checkpoint")
    if body["kind"] == "intent" and journal.unfinished is None:
        journal.entries.append(Entry(action_from_mapping(body["action"]), books=body.get("books", {})))
    elif body["kind"] == "result" and journal.unfinished is not None:
        journal.entries[-1].result = _built(Result, body["result"])
        journal.entries[-1].checkpoint = Checkpoint(**checkpoint) if checkpoint else None
    elif body["kind"] == "progress" and journal.unfinished is not None:
        journal.entries[-1].losses = _from_number(body["losses"])
    else:
        raise JournalError(f"{journal.path}: line {number} is a {body['kind']} out of turn.")


def state_name(file_name: str) -> str:
    """Return the name of the state that a file is, or is the part of one rank of."""
    return re.sub(r"\.rank-\d+", "", file_name)
