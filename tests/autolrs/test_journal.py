"""A journal is whole, or cut off at its end by a kill, or refused."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.journal import (
    Checkpoint,
    Journal,
    JournalError,
    action_from_mapping,
    action_to_mapping,
)
from autolrs_plugin.core.replay import same_action

FIRST = Checkpoint("0.safetensors", "ab")


def written(path: Path) -> Journal:
    journal = Journal.create(path, {"max_steps": 3, "lr_range": (0.1, 1.0)}, {"weights": "w"}, FIRST)
    journal.intend(Snapshot(), {"deciding_s": 0.125})
    journal.complete(Result(seconds=0.25))
    journal.intend(Probe(0, 1, (0.1, 0.2), math.inf, True, draw=2))
    journal.complete(Result((2.0, math.nan), seconds=1.0))
    journal.intend(Restore())
    journal.complete(Result())
    journal.intend(Train(0, (0.1, 0.3)))
    journal.complete(Result((1.0, -math.inf), tokens=7), Checkpoint("1.safetensors", "cd"))
    journal.intend(Evaluate(2))
    return journal


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    journal.close()
    again = Journal.open(path)
    assert repr(again.entries) == repr(journal.entries)  # repr, because nan is not itself
    assert again.header == journal.header
    assert again.header["config"] == {"max_steps": 3, "lr_range": [0.1, 1.0]}
    assert again.entries[0].books == {"deciding_s": 0.125}
    assert again.unfinished == Evaluate(2)
    assert again.entries[3].checkpoint == Checkpoint("1.safetensors", "cd")
    again.intend(Evaluate(2))  # repeated after a kill: noted once
    again.complete(Result(val_loss=0.5))
    again.intend(Done())
    last = Journal.read(path)
    assert last.entries[-1].action == Done()
    assert len(last.entries) == 6
    assert last.results()[-1].val_loss == 0.5


def test_a_journal_is_plain_json_lines(tmp_path: Path) -> None:
    written(tmp_path / "journal.jsonl")
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_cut_off_anywhere_it_holds_a_prefix_of_its_actions(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    journal.close()
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    cut = tmp_path / "cut.jsonl"
    for length in range(header, len(data) + 1):
        cut.write_bytes(data[:length])
        again = Journal.open(cut)
        lines = data[:length].count(b"\n") - 1
        assert [e.action for e in again.entries] == [e.action for e in journal.entries[: (lines + 1) // 2]]
        assert (again.unfinished is not None) == bool(lines % 2)
        again.close()
        assert cut.read_bytes() == data[: data[:length].rindex(b"\n") + 1]
    for length in (0, 1, header - 1):
        cut.write_bytes(data[:length])
        with pytest.raises(JournalError, match="is no journal"):
            Journal.open(cut)


def test_one_wrong_byte_anywhere_is_refused(tmp_path: Path) -> None:
    """Every byte in turn: one bit of it, its case, and another value."""
    path = tmp_path / "journal.jsonl"
    written(path).close()
    data = path.read_bytes()
    others = random.Random(0)
    for position, byte in enumerate(data):
        for wrong in {byte ^ 1, byte ^ 0x20, byte ^ others.randint(1, 255)}:
            damaged = data[:position] + bytes([wrong]) + data[position + 1 :]
            path.write_bytes(damaged)
            with pytest.raises(JournalError, match=r"corrupted|no journal"):
                Journal.read(path)
    with pytest.raises(JournalError, match="corrupted"):
        Journal.open(path)
    assert path.read_bytes() == damaged  # refused, and left as it is


def test_the_last_byte_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path).close()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(JournalError, match="line 10 is corrupted"):
        Journal.open(path)


def test_a_line_taken_out_or_moved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (lines[:2] + lines[4:], [lines[0], *lines[3:5], *lines[1:3]], [*lines[:3], lines[2]]):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(JournalError, match="is corrupted"):
            Journal.open(path)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autolrs_plugin.core.journal.VERSION", 7)
    written(tmp_path / "journal.jsonl").close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="is of version 7; this is version 2"):
        Journal.open(tmp_path / "journal.jsonl")


def test_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = written(path)
    with pytest.raises(
        JournalError, match=r"an AutoLRS of this process is writing this run; close\(\) that first"
    ):
        Journal.open(path)
    code = f"from autolrs_plugin.core.journal import Journal; Journal.open(__import__('pathlib').Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is writing this run" in other.stderr
    assert len(Journal.read(path).entries) == 5  # looking is allowed
    first.close()
    Journal.open(path).close()
    with pytest.raises(JournalError, match="is there already"):
        written(path)
    with pytest.raises(JournalError, match="cannot be read"):
        Journal.open(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "action",
    [Snapshot(), Restore(), Done(), Evaluate(3), Train(2, (0.1, 0.0)), Probe(1, 2, (1.0,), math.inf, False)],
)
def test_actions_are_the_same_as_plain_values(action: Action) -> None:
    assert action_from_mapping(json.loads(json.dumps(action_to_mapping(action)))) == action
    assert same_action(action, action)


def test_actions_are_compared_up_to_rounding() -> None:
    assert same_action(Train(0, (0.1, 0.2)), Train(0, (0.1, 0.2 + 1e-12)))
    assert not same_action(Train(0, (0.1, 0.2)), Train(0, (0.1, 0.2002)))
    assert not same_action(Train(0, (0.1, 0.2)), Train(1, (0.1, 0.2)))
    assert not same_action(Train(0, (0.1, 0.2)), Train(0, (0.1,)))
    assert not same_action(Snapshot(), Restore())
