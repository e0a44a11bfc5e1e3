"""The examples on Ray, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(name: str, *options: str) -> str:
    command = [sys.executable, f"examples/{name}.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ray_probes() -> None:
    told = run("ray_probes", "--steps=300")
    assert "planned: probed" in told
    assert "; took " in told
    assert "steps on top of 300" in told


def test_ray_train(tmp_path: Path) -> None:
    told = run("ray_train", "--steps=120", f"--storage={tmp_path}")
    assert "step 120: loss" in told
    assert "validation loss" in told
    assert list(tmp_path.rglob("autolrs_schedule.json"))


@pytest.mark.parametrize("name", ["ray_probes", "ray_train"])
def test_examples_stay_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 100
