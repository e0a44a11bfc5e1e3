"""The files of an engine's figures where their folder is deleted or cannot be written to while it serves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_sarathi.core.figures import Figures
from vllm_sarathi.engine import metrics
from vllm_sarathi.engine.metrics import FiguresFiles


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where this process looks for figures."""
    made = tmp_path / "figures"
    made.mkdir()
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(made))
    return made


def steps(count: int) -> Figures:
    figures = Figures()
    figures.count("steps", amount=count)
    return figures


def test_a_folder_that_was_deleted_is_made_again_and_said_once(folder: Path, warned: list[str]) -> None:
    files, registry = FiguresFiles(folder, 0, 1), CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # as the API server has it from the start
    files.renew(steps(3).samples(), 1.0)
    shutil.rmtree(folder)
    assert "vllm_sarathi" not in generate_latest(registry).decode()
    files.renew(steps(5).samples(), 2.0)
    files.renew(steps(7).samples(), 3.0)
    assert 'vllm_sarathi_steps_total{engine="0"} 7.0' in generate_latest(registry).decode()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert warned == [f"The folder of the metrics at /metrics was deleted: {folder} is made again."]


def test_figures_that_cannot_be_written_are_said_once_until_they_can(folder: Path, warned: list[str]) -> None:
    files = FiguresFiles(folder, 4, 1)
    said = f"The metrics of engine 4 at /metrics are no longer updated: {folder} cannot be written (Not a directory)."
    for _ in range(2):
        folder.rmdir()
        folder.touch()
        files.renew(steps(1).samples(), 1.0)
        files.renew(steps(2).samples(), 2.0)
        folder.unlink()
        folder.mkdir()
        files.renew(steps(3).samples(), 3.0)
        for path in folder.iterdir():
            path.unlink()
    assert warned == [said, said]


def test_the_end_of_a_process_leaves_no_folder_and_says_nothing(tmp_path: Path) -> None:
    code = (
        "import atexit, os\n"
        "from pathlib import Path\n"
        "from vllm_sarathi.core.figures import Figures\n"
        "from vllm_sarathi.engine.metrics import FOLDER_VARIABLE, FiguresFiles, serve_figures\n"
        "files = []\n"
        "atexit.register(lambda: files[0].renew(Figures().samples(), 1.0))\n"  # runs after the folder's end
        "serve_figures()\n"
        "files.append(FiguresFiles(Path(os.environ[FOLDER_VARIABLE]), 0, 1))\n"
        "files[0].renew(Figures().samples(), 1.0)\n"
        "assert len(os.listdir(os.environ[FOLDER_VARIABLE])) == 3\n"
    )
    env = {name: value for name, value in os.environ.items() if name != metrics.SHARED_FOLDER_VARIABLE}
    env["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())
