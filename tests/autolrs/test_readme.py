"""What the README says about AutoLRS works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from tests.autolrs.jobs import Job, batch_step, loader

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def test_the_code_and_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.partition("## AutoLRS")[2].partition("\n## ")[0]
    train, replay = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    job = Job("adam")
    names: dict[str, Any] = {
        "model": job.model,
        "optimizer": job.optimizer,
        "step": batch_step(job),
        "loader": loader(job),
        "val": job.validate,
    }
    exec(train.replace("2000", "200"), names)
    assert len(names["schedule"]) == 200
    commands = re.findall(r"^\| `autolrs (.*?)`", section, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        if command.startswith("bench"):
            continue
        words = command.replace("RUN", "runs/one").replace("N", "200").replace("A,B", "1e-4,1").split()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    again = Job("adam")
    names["optimizer"] = again.optimizer
    exec(replay, names)
    assert names["scheduler"].get_last_lr()[0] == names["schedule"](0)
