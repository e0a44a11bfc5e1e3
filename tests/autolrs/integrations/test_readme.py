"""What the README and the page on frameworks say about the adapters works as it stands there."""

import ast
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import TrainingArguments
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from tests.autolrs.integrations import task, with_lightning
from tests.autolrs.test_testing import job
from tests.pages import blocks_of, section_of
from tests.test_house import ROOT


def python_in(text: str) -> list[str]:
    return [block.text for block in blocks_of(text) if block.language == "python"]


# A progress bar is drawn by a thread.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/how-to/frameworks.md").read_text()
    in_trainer, again, in_lightning, in_accelerate, in_check = python_in(page)
    (in_readme,) = python_in(section_of((ROOT / "README.md").read_text(), "## Fine-tune"))
    # The README's is the page's without its comments, and so is run here, too.
    assert ast.dump(ast.parse(in_readme)) == ast.dump(ast.parse(in_trainer))
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
    names["model"] = task.Net()
    exec(again, names)
    names["trainer"].train()
    assert names["trainer"].state.global_step == 60
    assert names["replay"].last_epoch == 60

    module = with_lightning.Module(0.0, False, task.loader(task.Pictures()))
    module.training_step = lambda batch, batch_idx: module.net(**batch)["loss"]  # type: ignore[method-assign]
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

    exec(in_check, {"run": job})
