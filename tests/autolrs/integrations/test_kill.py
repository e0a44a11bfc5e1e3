"""A Trainer that is killed goes on from its last checkpoint to the same bits."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.autolrs.integrations.test_examples import check_result
from tests.test_house import ROOT

STEPS = 140
"""Enough for a search."""


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples/trainer.py"), "--steps", str(STEPS), "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, text=True, cwd=folder
    )


def is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return False
    return True


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_killed_trainer_ends_on_the_same_bits(tmp_path: Path) -> None:
    printed = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = start(tmp_path / "whole")
    printed["whole"] = whole.communicate()[0]
    killed = start(tmp_path / "killed")
    state = tmp_path / "killed" / f"checkpoint-{STEPS // 4}" / "trainer_state.json"
    while killed.poll() is None and not is_whole(state):
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9, "it ended before it was killed"
    resumed = start(tmp_path / "killed", "--resume")
    printed["killed"] = resumed.communicate()[0]
    assert whole.returncode == resumed.returncode == 0
    results = {
        name: re.findall(r"^(peak.*|the search.*)$", text, re.MULTILINE) for name, text in printed.items()
    }
    assert len(results["whole"]) == 2
    check_result(printed["whole"])
    assert re.search(r"search took [1-9]", printed["whole"]), printed["whole"]
    assert results["whole"] == results["killed"]
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
