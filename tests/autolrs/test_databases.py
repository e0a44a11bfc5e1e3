"""A database of sqlite3 that a step writes to: one in memory is set back, all others are named."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from autolrs_plugin.training import databases
from autolrs_plugin.training.databases import content_of, database_seen
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of

MAKE = "CREATE TABLE IF NOT EXISTS seen (loss REAL)"


class Recording(Kind):
    """Writes each loss to a database, and has its mean in the next loss."""

    place, options_there = ":memory:", dict[str, Any]()
    made_before, commits, by_cursor, many = True, True, False, False

    def prepare(self) -> None:
        self.database = sqlite3.connect(self.place, **self.options_there)
        if self.made_before:
            with self.database:
                self.database.execute(MAKE)
                self.database.execute("INSERT INTO seen VALUES (1.0)")
        self.writer: Any = self.database.cursor() if self.by_cursor else self.database
        if self.by_cursor:
            del self.database

    def mean(self) -> float:
        return self.writer.execute("SELECT avg(loss) FROM seen").fetchall()[0][0] or 0.0

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        self.writer.execute(MAKE)
        return super().loss(index) * (1 + self.mean())

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        rows = [(loss.item(),)] * (2 if self.many else 1)
        self.writer.executemany("INSERT INTO seen VALUES (?)", rows)
        if self.commits:
            (self.writer.connection if self.by_cursor else self.writer).commit()

    def seen(self) -> Any:
        database = self.writer.connection if self.by_cursor else self.writer
        tables = database.execute("SELECT name FROM sqlite_master").fetchall()
        return tables and database.execute("SELECT rowid, loss FROM seen").fetchall()


class ByCursor(Recording):
    by_cursor = many = True


class Empty(Recording):
    """The table is made in the first step, which is a probe's."""

    made_before = False


class Shared(Recording):
    """Memory that another connection sees, too."""

    def prepare(self) -> None:
        self.place, self.options_there = f"file:{uuid4()}?mode=memory&cache=shared", {"uri": True}
        super().prepare()
        self.other = sqlite3.connect(self.place, uri=True)

    def seen(self) -> Any:
        return self.other.execute("SELECT rowid, loss FROM seen").fetchall()


class Rows(Recording):
    """A connection with settings of its own."""

    def prepare(self) -> None:
        super().prepare()
        self.database.row_factory = sqlite3.Row
        self.database.text_factory = bytes

    def seen(self) -> Any:
        return [tuple(row) for row in super().seen()]


@pytest.mark.parametrize("kind", [Recording, ByCursor, Rows, Shared], ids=lambda kind: kind.__name__)
def test_a_database_in_memory_is_that_of_the_run_without(kind: type[Recording], tmp_path: Path) -> None:
    without = plainly(kind())
    job = kind()
    with script(PLAN):
        tuner_of(job).run()
    assert everything(job) == without
    with script(PLAN):
        first = tuner_of(job := kind(), run_dir=tmp_path)
        for _ in range(6):
            first.tell(first.perform(first.next_action()))
        first.close()
        resumed = kind()
        tuner_of(resumed, run_dir=tmp_path).run()
    assert everything(resumed) == without


def test_a_database_without_a_table_is_empty_again_after_a_probe() -> None:
    job = Empty()
    with script(PLAN[1:]):
        tuner = tuner_of(job)
        for _ in range(4):  # two probes of one stage
            tuner.tell(tuner.perform(tuner.next_action()))
    assert job.seen() == []


class InAFile(Recording):
    def prepare(self) -> None:
        self.place = f"{FOLDER[0]}/seen.db"
        super().prepare()


class Open(Recording):
    """Leaves a transaction open."""

    commits = False


class Attached(Recording):
    """Has a second database."""

    def prepare(self) -> None:
        super().prepare()
        self.database.execute("ATTACH ':memory:' AS other")


class Reading(Kind):
    """Takes the rows of one query, a step at a time."""

    def prepare(self) -> None:
        with sqlite3.connect(":memory:") as database:
            database.execute("CREATE TABLE numbers (n REAL)")
            database.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in range(100)])
        self.rows = database.execute("SELECT n FROM numbers")

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        return super().loss(index) * next(self.rows)[0]


FOLDER: list[Path] = []


@pytest.mark.parametrize("kind", [InAFile, Open, Attached, Reading], ids=lambda kind: kind.__name__)
def test_what_cannot_be_set_back_is_named_before_the_run_goes_on(kind: type[Kind], tmp_path: Path) -> None:
    FOLDER[:] = [tmp_path]
    what = "rows (a Cursor)" if kind is Reading else "database (a Connection)"
    with script(PLAN[1:]), pytest.raises(RuntimeError, match="was changed by a probe") as raised:
        tuner_of(kind()).run()
    assert what in str(raised.value)
    assert ("commit() before train_step returns" in str(raised.value)) == (kind is not Reading)


def test_a_database_that_no_step_writes_to_is_no_matter(tmp_path: Path) -> None:
    for place in (":memory:", tmp_path / "some.db"):
        job: Any = Kind()
        with closing(sqlite3.connect(place)) as database:
            database.execute(MAKE)
            database.execute("INSERT INTO seen VALUES (1.0)")  # and its transaction stays open
            job.after = lambda loss, index, d=database: d.execute("SELECT * FROM seen").fetchall()
            with script(PLAN):
                tuner_of(job).run()
            assert database.in_transaction


def test_a_large_database_and_a_closed_one_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "MOST_BYTES", 4096)
    database = sqlite3.connect(":memory:")
    assert content_of(database) == b""
    database.execute(MAKE)
    before = database_seen(database)
    assert content_of(database) is None
    with database:
        database.execute("INSERT INTO seen VALUES (1.0)")
    assert database_seen(database) != before
    database.close()
    assert database_seen(database) == "closed"


def test_a_database_of_another_thread_is_watched() -> None:
    made: list[sqlite3.Connection] = []
    go, done = threading.Event(), threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(":memory:")) as database:
            made.append(database)
            done.set()
            go.wait()
            database.execute(MAKE)
            database.execute("INSERT INTO seen VALUES (1.0)")
            done.set()
            go.clear()
            go.wait()

    writer = threading.Thread(target=write)
    writer.start()
    done.wait()
    done.clear()
    assert content_of(made[0]) is None
    before = database_seen(made[0])
    go.set()
    done.wait()
    assert database_seen(made[0]) not in (before, "closed")
    while writer.is_alive():
        go.set()
        writer.join(0.01)
