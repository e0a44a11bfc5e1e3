"""The examples run from a clone, offline, on what the packages bring along."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autolrs_plugin.benchmark.adapter_overhead import ADAPTERS, measure
from tests.test_house import ROOT

EXAMPLES = {
    "plain_loop": ["--steps", "80"],
    "trainer": ["--steps", "80"],
    "trl_lora": ["--steps", "60"],
    "lightning_module": ["--steps", "80"],
    "accelerate_loop": ["--steps", "80"],
    "replay_schedule": ["--steps", "120"],
}


def run(name: str, folder: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in EXAMPLES if name != "trainer"]
)  # that is killed, in test_kill
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, *EXAMPLES[name])
    if name == "replay_schedule":
        searched, replayed = re.findall(r"loss (\d+\.\d+)", printed)
        assert searched == replayed
        assert "the same weights" in printed
        return
    check_result(printed)


def check_result(printed: str) -> None:
    """Look at what an example has printed of its end."""
    match = re.search(r"peak learning rate (\S+), (?:validation )?loss (\S+)", printed)
    assert match is not None
    assert 1e-6 < float(match[1]) < 1
    assert float(match[2]) < 5.4  # untrained: 5.5 and more


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 100


@pytest.mark.slow
def test_the_overhead_is_measured() -> None:
    """The figure itself is judged on a quiet machine: here it is only a positive share of a step."""
    for adapter in ADAPTERS:
        measured = measure(adapter, 20)
        assert measured.steps == 20
        assert 0 < measured.share < 1
