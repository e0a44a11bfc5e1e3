"""The four fields that training services take, and how far they are from the schedule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from autolrs_plugin import AutoLRS
from autolrs_plugin.cli import app
from autolrs_plugin.core.actions import Train
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.export import field_curve, to_fields
from tests.autolrs.jobs import Job
from tests.autolrs.scripted import script


@pytest.mark.parametrize(
    ("kind", "warmup", "least"),
    [("linear", 0.05, 0.0), ("linear", 0.0, 0.25), ("cosine", 0.1, 0.1), ("constant", 0.05, 1.0)],
)
def test_what_the_fields_can_say_comes_back_exactly(kind: str, warmup: float, least: float) -> None:
    fields = to_fields((3e-4 * field_curve(kind, 400, warmup, least)).tolist())
    assert (fields.lr_scheduler_type, fields.warmup_ratio, fields.min_lr_ratio) == (kind, warmup, least)
    assert fields.learning_rate == pytest.approx(3e-4)
    assert fields.max_deviation < 1e-12


def test_the_curves_are_those_of_transformers() -> None:
    schedules = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = {
        "linear": schedules.get_linear_schedule_with_warmup(optimizer, 10, 100),
        "cosine": schedules.get_cosine_schedule_with_warmup(optimizer, 10, 100),
        "constant": schedules.get_constant_schedule_with_warmup(optimizer, 10),
    }
    for kind, scheduler in made.items():
        wanted = [scheduler.lr_lambdas[0](step) for step in range(100)]
        assert field_curve(kind, 100, 0.1, 0.0 if kind != "constant" else 1.0) == pytest.approx(wanted)


def test_the_deviation_is_that_of_the_rates_that_are_exported() -> None:
    plateau = [1e-3] * 80 + [1e-3 * (20 - t) / 20 for t in range(20)]
    fields = to_fields(plateau)
    curve = field_curve(fields.lr_scheduler_type, 100, fields.warmup_ratio, fields.min_lr_ratio)
    off = np.abs(fields.learning_rate * curve - plateau)
    assert fields.max_deviation == pytest.approx(off.max() / 1e-3)
    assert fields.mean_deviation == pytest.approx(off.mean() / np.mean(plateau))
    assert off[fields.max_deviation_step] == off.max()
    assert fields.max_deviation > 0.05  # four fields cannot say a plateau with a decay
    far = f"{fields.max_deviation:.1%} of the greatest (at step {fields.max_deviation_step}); use the exported list"
    assert far in fields.deviation()
    near = to_fields([1e-3] * 95 + [1e-3 * (5 - t) / 5 for t in range(5)])
    assert near.mean_deviation < 0.05
    assert "use the exported list" not in near.deviation()


def test_no_schedule_is_told() -> None:
    for lrs in ([], [0.0, 0.0]):
        with pytest.raises(ConfigError, match=r"none above 0; there is no schedule to export"):
            to_fields(lrs)


def test_the_command_writes_both(tmp_path: Path) -> None:
    job = Job()
    rates = tuple(0.1 * (10 - t) / 10 for t in range(10))
    with script([Train(0, rates)]):
        tuner = AutoLRS(
            job.model, job.optimizer, max_steps=10, lr_range=(1e-3, 1.0), train_step=job.step, run_dir=tmp_path,
            progress=False,
        )  # fmt: skip
        tuner.run()
        tuner.close()
    out = tmp_path / "schedule.json"
    done = CliRunner().invoke(
        app, ["export", str(tmp_path), "-o", str(out), "--fields", str(tmp_path / "four.json")]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["lrs"] == list(rates)
    fields = json.loads((tmp_path / "four.json").read_text())
    assert fields["lr_scheduler_type"] == "linear"
    assert fields["learning_rate"] == pytest.approx(0.1)
    assert sorted(fields) == ["learning_rate", "lr_scheduler_type", "min_lr_ratio", "warmup_ratio"]
    assert "the four fields differ from the schedule by 0.0%" in done.output.replace("\n", "")
