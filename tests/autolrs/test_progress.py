"""What a run shows while it goes on: a line per search, a bar, scalars."""

import logging
from pathlib import Path
from typing import Any

import pytest

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Done
from tests.autolrs.jobs import Job


class Writer:
    """What TensorBoard's SummaryWriter is used as."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append((step, value))

    def flush(self) -> None:
        self.flushed += 1


def tuner(**changes: Any) -> AutoLRS:
    job = Job("adam")
    arguments = {"max_steps": 200, "lr_range": (1e-4, 1.0), "validate": job.validate, "train_step": job.step}
    return AutoLRS(job.model, job.optimizer, **{**arguments, **changes})


def test_one_line_is_logged_per_search(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "autolrs_plugin")
    made = tuner(progress=False)
    made.run()
    lines = [r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("autolrs_plugin", "INFO")]
    assert len(lines) == len(made.stages) > 0
    for line, stage in zip(lines, made.stages, strict=True):
        assert "\n" not in line
        assert line.startswith(
            f"stage {stage.index} ({stage.kind}) at step {stage.first_step}: learning rate {stage.chosen_lr:.3g} after "
            f"{len(stage.candidates)} probes"
        )
        reason = line.partition("). ")[2]
        assert reason[0].isupper()
        assert reason.endswith(".")
        assert reason.lower() == f"{stage.reason}.".lower()


def test_a_bar_shows_the_steps_with_the_lines_above_it(capfd: pytest.CaptureFixture[str]) -> None:
    made = tuner()
    made.run()
    shown = capfd.readouterr().err
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("stage ")][
        : len(made.stages)
    ] == [f"stage {stage.index} ({stage.kind}) at step {stage.first_step}" for stage in made.stages]
    assert "200/200" in shown


def test_scalars_are_those_of_the_run() -> None:
    writer = Writer()
    made = tuner(progress=False, tensorboard=writer)
    made.run()
    # A chunk that was taken back is written again; the last word on a step counts.
    assert [lr for _, lr in sorted(dict(writer.scalars["autolrs/lr"]).items())] == list(made.schedule.lrs)
    assert [v for _, v in sorted(dict(writer.scalars["autolrs/train_loss"]).items())] == list(made.losses)
    assert writer.scalars["autolrs/val_loss"] == list(made.val_losses)
    assert writer.scalars["autolrs/chosen_lr"] == [(s.first_step, s.chosen_lr) for s in made.stages]
    probed = sum(stage.search_steps for stage in made.stages)
    assert max(value for _, value in writer.scalars["autolrs/search_steps"]) >= probed
    assert writer.flushed == 1


def test_a_folder_is_written_by_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tuner(progress=False, tensorboard=tmp_path).run()
    (file,) = tmp_path.iterdir()
    assert b"autolrs/val_loss" in file.read_bytes()


def test_a_run_that_goes_on_does_not_say_it_all_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autolrs_plugin")
    first = tuner(progress=False, run_dir=tmp_path, mode="once")
    while not first.schedule.lrs:
        first.tell(first.perform(first.next_action()))
    first.close()
    caplog.clear()
    searches = len(first.stages)
    assert searches > 0
    writer = Writer()
    second = tuner(progress=False, run_dir=tmp_path, tensorboard=writer, mode="once")
    while not isinstance(action := second.next_action(), Done):
        second.tell(second.perform(action))
    assert len(caplog.records) == len(second.stages) - searches
    assert len(writer.scalars.get("autolrs/chosen_lr", [])) == len(second.stages) - searches


@pytest.mark.parametrize(
    ("steps", "validates", "says"),
    [
        (60, True, "max_steps=60: leaves no room for a search (search_budget=0.25 of the steps)"),
        (60, False, "max_steps=60: leaves no room for a search"),
        (150, True, "validation: decides nothing in so short a run (max_steps=150)"),
        (150, False, None),
        (1000, True, None),
    ],
)
def test_what_there_is_no_room_for_is_told_beforehand(
    steps: int, validates: bool, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job("adam")
    made = tuner(progress=False, max_steps=steps, validate=job.validate if validates else None)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == (says is not None)
    assert not says or told[0].startswith(says)
    assert made.schedule.lrs == ()  # before the first step
    if steps < 1000:  # and so it is
        made.run()
        probes = [c for stage in made.stages for c in stage.candidates]
        assert bool(probes) == (steps > 60)
        assert not any(c.val_loss is not None for c in probes)
