"""A run that is gone on with in a new process is the run that was never stopped; what does not fit is refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Done, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.journal import FILE_NAME, JournalError
from autolrs_plugin.training.checkpoint import CheckpointError
from autolrs_plugin.training.lr import GroupRates
from tests.autolrs.jobs import OPTIMIZERS, Job, loader
from tests.autolrs.scripted import PROBING, RATES, script


class Averages:
    """An average of the weights, as many trainings keep one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.values = [p.detach().clone() for p in job.model.parameters()]

    def update(self) -> None:
        for value, parameter in zip(self.values, self.job.model.parameters(), strict=True):
            value.lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class Whole:
    """A training with everything: AMP, a scaler, a scheduler, averages, several generators, accumulation."""

    def __init__(self, optimizer: str = "adam", dtype: torch.dtype = torch.float32) -> None:
        random.seed(0)
        np.random.seed(0)
        self.job = Job(optimizer, dtype, seed=4)
        self.job.optimizer.param_groups[1]["lr"] *= 0.3
        self.data = loader(self.job, generator=torch.Generator().manual_seed(8))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.job.optimizer, 2)
        self.averages = Averages(self.job)
        self.noise = np.random.default_rng(5)
        self.rates = GroupRates(self.job.optimizer)

    def step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        job, total = self.job, torch.zeros(())
        job.optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = job.model(inputs[part] + 0.01 * float(self.noise.normal()))
                loss = torch.nn.functional.cross_entropy(logits.float(), targets[part]) / 2
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(job.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.averages.update()
        return total

    def state(self) -> list[Any]:
        values = [self.job.bits(), self.scaler.state_dict(), self.scheduler.state_dict()["last_epoch"]]
        values += [[v.tolist() for v in self.averages.values], self.noise.bit_generator.state]
        return values

    def tuner(self, **changes: Any) -> AutoLRS:
        arguments = {
            "max_steps": 7,
            "lr_range": (1e-3, 1.0),
            "train_step": self.step,
            "validate": self.job.validate,
            "train_data": self.data,
            "scaler": self.scaler,
            "scheduler": self.scheduler,
            "stateful": {"averages": self.averages},
            "generators": [self.noise],
            "progress": False,
        }
        with script():
            return AutoLRS(self.job.model, self.job.optimizer, **{**arguments, **changes})


def trained_plainly(optimizer: str = "adam", dtype: torch.dtype = torch.float32) -> list[Any]:
    whole, left = Whole(optimizer, dtype), list(RATES)
    while left:
        for batch in whole.data:
            if left:
                whole.rates.set(left.pop(0))
                whole.step(batch)
    return whole.state()


def advanced(tuner: AutoLRS, actions: int) -> None:
    """Take some actions and stop where a kill hurts most: after the next one took effect, before it is told."""
    for _ in range(actions):
        tuner.tell(tuner.perform(tuner.next_action()))
    action = tuner.next_action()
    if not isinstance(action, Done):
        tuner.perform(action)
    tuner.close()


@pytest.mark.parametrize("keep", ["host", "device", "disk"])
def test_a_training_with_everything_is_the_plain_loop(keep: str) -> None:
    whole = Whole()
    whole.tuner(keep=keep).run()
    assert whole.state() == trained_plainly()


@pytest.mark.parametrize("stop", range(len(PROBING) + 1))
def test_stopped_anywhere_it_goes_on_to_the_same_end(stop: int, tmp_path: Path) -> None:
    keep = ("host", "device", "disk")[stop % 3]
    advanced(Whole().tuner(run_dir=tmp_path, keep=keep), stop)
    whole = Whole()
    tuner = whole.tuner(run_dir=tmp_path, keep=keep)
    assert tuner.run().lrs == RATES
    assert whole.state() == trained_plainly()
    assert len(list(tmp_path.glob("state-*"))) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adam"])
def test_every_optimizer_goes_on(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stop = 4
    if name == "adafactor-transformers":
        pytest.importorskip("transformers")
    advanced(Whole(name, dtype).tuner(run_dir=tmp_path), stop)
    whole = Whole(name, dtype)
    whole.tuner(run_dir=tmp_path).run()
    assert whole.state() == trained_plainly(name, dtype)


def test_a_run_that_is_complete_is_read_back(tmp_path: Path) -> None:
    first = Whole()
    tuner = first.tuner(run_dir=tmp_path)
    tuner.run()
    tuner.close()
    second = Whole()
    again = second.tuner(run_dir=tmp_path, resume=True)
    assert isinstance(again.next_action(), Done)
    assert again.schedule == tuner.schedule
    assert again.val_losses == tuner.val_losses
    assert second.state() == first.state()
    books, old = again.ledger, tuner.ledger
    assert (books.train, books.search, books.snapshot) == (old.train, old.search, old.snapshot)
    # What deciding took is that of the run: the last note of it was made before the last action.
    assert 0 < books.deciding_s <= old.deciding_s
    assert 0 < books.bookkeeping_s <= 1.01 * old.bookkeeping_s + 1.0


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    advanced(Whole().tuner(run_dir=tmp_path), 5)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_steps": 8}, "its setting 'max_steps' is 7, and here it is 8"),
        ({"lr_range": (1e-4, 1.0)}, "its setting 'lr_range' is"),
        ({"search_budget": 0.5}, "its setting 'search_budget' is 0.25, and here it is 0.5"),
        ({"seed": 1}, "its setting 'seed' is 0, and here it is 1"),
        ({"resume": False}, "holds a run already; resume it, or choose another folder"),
    ],
)
def test_other_settings_are_another_run(stopped: Path, changes: dict[str, Any], says: str) -> None:
    whole = Whole()
    before = whole.state()
    with pytest.raises(JournalError, match=says):
        whole.tuner(run_dir=stopped, **changes)
    assert whole.state() == before
    Whole().tuner(run_dir=stopped).close()  # refused, and left as it was


def test_another_job_is_another_run(stopped: Path) -> None:
    other = Whole("momentum")
    # Its own rate is the prior, and another one here: with the same prior it is still another job.
    with pytest.raises(JournalError, match="its run 'optimizer' is 'Adam', and here it is 'SGD'"):
        other.tuner(run_dir=stopped, prior=0.01)
    other = Whole(dtype=torch.bfloat16)
    with pytest.raises(JournalError, match="its run 'initial' is"):
        other.tuner(run_dir=stopped)
    with pytest.raises(JournalError, match="its run 'parameters' is"):
        other.tuner(run_dir=stopped, resume=True)
    other = Whole()
    other.job.optimizer.param_groups[1]["initial_lr"] *= 2
    with pytest.raises(JournalError, match="its run 'group_ratios' is"):
        other.tuner(run_dir=stopped)
    other = Whole()
    torch.nn.init.zeros_(other.job.model.out.weight)
    with pytest.raises(JournalError, match=r"its run 'initial' is .*resume=True takes over the run's own"):
        other.tuner(run_dir=stopped)
    other.tuner(run_dir=stopped, resume=True).run()
    assert other.state() == trained_plainly()


def test_there_must_be_a_run_to_insist_on(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="holds no run to resume"):
        Whole().tuner(run_dir=tmp_path, resume=True)


def test_a_journal_of_another_version_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autolrs_plugin.core.journal.VERSION", 7)
    sentence = "is of version 2; this is version 7: go on with the release of autolrs_plugin that wrote it, or choose"
    before = (stopped / FILE_NAME).read_bytes()
    for argument in ("run_dir", "warm_start"):
        with pytest.raises(JournalError, match=sentence):
            Whole().tuner(**{argument: stopped})
    assert (stopped / FILE_NAME).read_bytes() == before


def test_a_version_that_decides_otherwise_uses_nothing_of_it(stopped: Path) -> None:
    whole = Whole()
    before = whole.state()
    with (
        script([Snapshot(), Probe(0, 0, (0.3,) * 4, 9.0, evaluate=False), Restore(), Train(0, (0.1,))]),
        pytest.raises(JournalError, match=r"action 0 was Train\(.*\), and would now be Snapshot\(\)"),
    ):
        AutoLRS(
            whole.job.model, whole.job.optimizer, max_steps=7, lr_range=(1e-3, 1.0), train_step=whole.step,
            validate=whole.job.validate, train_data=whole.data, run_dir=stopped, progress=False,
        )  # fmt: skip
    assert whole.state() == before


def test_a_byte_changed_anywhere_is_refused_before_the_job_is_touched(stopped: Path) -> None:
    whole = Whole()
    before = whole.state()
    for path, error in (
        (stopped / FILE_NAME, JournalError),
        *((p, CheckpointError) for p in stopped.glob("state-*")),
    ):
        data = path.read_bytes()
        for position in range(3, len(data), len(data) // 12):
            path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            with pytest.raises(error, match=r"corrupted|no journal|SHA-256 differs"):
                whole.tuner(run_dir=stopped)
            assert whole.state() == before
        path.write_bytes(data)
    whole.tuner(run_dir=stopped).run()
    assert whole.state() == trained_plainly()


def test_a_missing_state_is_named(stopped: Path) -> None:
    for path in stopped.glob("state-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"state-\d+.safetensors: the checkpoint cannot be read"):
        Whole().tuner(run_dir=stopped)


def test_two_cannot_train_one_run(stopped: Path) -> None:
    first = Whole().tuner(run_dir=stopped)
    with pytest.raises(JournalError, match="an AutoLRS of this process is writing this run"):
        Whole().tuner(run_dir=stopped)
    first.close()
    Whole().tuner(run_dir=stopped).close()


def test_a_run_under_a_relative_path_is_known_after_a_change_of_folder(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped.parent)
    first = Whole().tuner(run_dir=stopped.name)
    monkeypatch.chdir("/")
    with pytest.raises(JournalError, match="an AutoLRS of this process is writing this run"):
        Whole().tuner(run_dir=stopped)
    first.close()


def test_a_run_outlives_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.chdir(folder)
    whole = Whole()
    tuner = whole.tuner(run_dir=tmp_path / "run")
    tuner.tell(tuner.perform(tuner.next_action()))
    folder.rmdir()
    tuner.run()
    assert whole.state() == trained_plainly()
