"""What the tutorial says about AutoLRS works as it stands there."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autolrs_plugin.cli import app
from tests.autolrs.jobs import Job
from tests.pages import blocks_of, commands_of
from tests.test_house import ROOT


def test_the_code_and_the_commands_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/tutorials/fine-tuning.md").read_text()
    build, train, replay = [block.text for block in blocks_of(page) if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(build + train.replace("2000", "200"), names)
    assert len(names["schedule"]) == 200
    commands = [words[1:] for words in commands_of(page) if words[0] == "autolrs" and words[1] != "find"]
    assert {words[0] for words in commands} == {"show", "plot", "export", "preview"}
    for words in commands:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    again = Job("adam")
    names["optimizer"] = again.optimizer
    exec(replay, names)
    assert names["scheduler"].get_last_lr()[0] == names["schedule"](0)
