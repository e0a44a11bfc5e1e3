"""What the README says about the adapters works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import TrainingArguments
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from tests.autolrs.integrations import task, with_lightning
from tests.test_house import ROOT


# A progress bar is drawn by a thread.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (
        (ROOT / "README.md").read_text().partition("## AutoLRS in your framework")[2].partition("\n## ")[0]
    )
    in_trainer, in_lightning, in_accelerate = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": task.Net(),
        "args": TrainingArguments("out", max_steps=60, use_cpu=True, report_to=[], save_strategy="no"),
        "train": task.Pictures(),
        "val": task.Pictures(task.VALIDATION),
    }
    exec(in_trainer, names)
    assert len(names["tuner"].schedule) == 60
    for command in (
        "show runs/trainer",
        "export runs/trainer -o schedule.json",
        "plot runs/trainer -o run.png",
    ):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, done.output

    module = with_lightning.Module(0.0, False, task.loader(task.Pictures()))
    module.training_step = lambda batch, batch_idx: module.net(**batch)["loss"]
    exec(in_lightning, {"module": module, "steps": 60})
    assert len(module.net.trained_on()) == 60 * task.BATCH

    accelerator, model = Accelerator(cpu=True), task.Net()
    optimizer = task.make_optimizer(model)

    def train_step(batch: Any) -> Any:
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "train_step": train_step}
    names["loader"] = task.loader(task.Pictures(60 * task.BATCH))
    exec(in_accelerate, names)
    assert len(names["tuner"].schedule) == 60
