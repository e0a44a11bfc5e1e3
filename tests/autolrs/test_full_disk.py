"""A disk that takes no more: what was written before is whole, a sentence says so, and the run goes on from there."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from autolrs_plugin.core.journal import Journal, JournalError
from autolrs_plugin.training.checkpoint import CheckpointError
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of


@contextmanager
def full(size: int) -> Iterator[None]:
    """Inside, no file of this process gets longer than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fresh() -> Kind:
    torch.manual_seed(0)
    return Kind()


def test_a_state_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path: Path) -> None:
    whole = plainly(fresh())
    with script(PLAN):
        tuner = tuner_of(fresh(), run_dir=tmp_path)
    for _ in range(5):
        tuner.tell(tuner.perform(tuner.next_action()))
    assert (tmp_path / "journal.jsonl").stat().st_size < 4_000  # that can still be written to
    with (
        full(4_000),
        pytest.raises(CheckpointError, match=r"the state cannot be written \(.*before it is whole"),
    ):
        tuner.run()
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(RuntimeError, match=r"could not be written down: .*it goes on at step 2\.$"):
        tuner.run()
    job = fresh()
    with script(PLAN):
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == whole


@pytest.mark.parametrize("left", [0, 40, 300])
@pytest.mark.parametrize("told", [0, 1, 2, 4, 6])
def test_a_journal_that_cannot_be_written_ends_the_run_and_is_whole(
    told: int, left: int, tmp_path: Path
) -> None:
    """Whether an action is cut off or its result, with some of the line written."""
    whole, path = plainly(fresh()), tmp_path / "journal.jsonl"
    with script(PLAN):
        tuner = tuner_of(fresh(), run_dir=tmp_path)
    for _ in range(told):
        tuner.tell(tuner.perform(tuner.next_action()))
    cut = pytest.raises((JournalError, CheckpointError), match=r"cannot be written \(.*[Ff]ile too large")
    with cut, full(path.stat().st_size + left):
        tuner.run()
    assert path.read_bytes().endswith(b"\n")
    Journal.read(path)
    with pytest.raises(RuntimeError, match="Start the script again"):
        tuner.next_action()
    job = fresh()
    with script(PLAN):
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == whole


def test_where_the_state_is_kept_on_a_full_disk_a_search_can_be_asked_for_again() -> None:
    whole, job = plainly(fresh()), fresh()
    with script(PLAN):
        tuner = tuner_of(job, keep="disk")
    tuner.tell(tuner.perform(tuner.next_action()))
    before = everything(job)
    with full(2_000), pytest.raises(CheckpointError, match="the state cannot be written"):
        tuner.run()
    assert everything(job) == before
    tuner.run()
    assert everything(job) == whole


def test_a_folder_on_a_full_disk_begins_no_run(tmp_path: Path) -> None:
    with script(PLAN), full(100), pytest.raises(CheckpointError, match="the state cannot be written"):
        tuner_of(fresh(), run_dir=tmp_path)
    with script(PLAN):
        tuner_of(fresh(), run_dir=tmp_path).close()
