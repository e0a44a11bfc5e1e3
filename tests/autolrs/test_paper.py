"""The paper's comparison: its hand-made schedules, what a speedup is, and the files."""

import csv
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from autolrs_plugin.benchmark import paper
from autolrs_plugin.benchmark.paper import (
    Original,
    compare,
    inverse_square_root,
    linear,
    run_paper,
    step_decay,
)
from autolrs_plugin.benchmark.tasks import TASKS
from autolrs_plugin.cli import app
from tests.autolrs.test_bench import TOY


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)
    originals = (Original("toy", "Toy", linear, 1e-4, 1.5), Original("toy", "Toy, tuned", linear, 0.3, 1.2))
    monkeypatch.setattr(paper, "ORIGINALS", originals)


def test_the_hand_made_schedules() -> None:
    steps = step_decay(0.1, 900)
    assert [steps(t) for t in (0, 299, 300, 600, 800)] == pytest.approx([0.1, 0.1, 1e-2, 1e-3, 1e-4])
    root = inverse_square_root(2.0, 1000)
    assert root(39) == pytest.approx(2.0)
    assert root(159) == pytest.approx(1.0)  # four times the steps, half the rate
    line = linear(1.0, 100)
    assert [line(t) for t in (4, 9, 55, 99)] == pytest.approx([0.5, 1.0, 0.5, 1 / 90])


def test_a_speedup_is_that_of_the_shortest_run_that_gets_there() -> None:
    """The schedule's own peak is far too low: a run of the least part of its steps is better."""
    row = compare(Original("toy", "Toy", linear, 1e-4, 1.5), 0, 1.0)
    assert row.val_loss <= row.target
    assert row.train_steps == round(paper.RUNS[0] * TOY.steps)
    assert row.uncounted == pytest.approx(TOY.steps / row.train_steps)
    assert row.counted == pytest.approx(TOY.steps / row.all_steps)
    assert row.counted <= row.uncounted


def test_where_no_run_gets_there_is_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "RUNS", (0.1, 0.2))
    row = compare(Original("toy", "Toy", linear, 0.3, 1.2), 0, 1.0)
    assert row.val_loss > row.target
    assert (row.uncounted, row.counted) == (0.0, 0.0)
    assert "| not reached | not reached | 1.20x |" in paper.markdown([row])


def test_the_files(tmp_path: Path) -> None:
    rows = run_paper(tmp_path, 2, True, Console(quiet=True))
    assert [(row.model, row.seed) for row in rows] == [
        ("Toy", 0), ("Toy, tuned", 0), ("Toy", 1), ("Toy, tuned", 1),
    ]  # fmt: skip
    written = list(csv.DictReader((tmp_path / "paper.csv").open()))
    assert [float(row["target"]) for row in written] == [row.target for row in rows]
    assert (tmp_path / "paper.md").read_text() == paper.markdown(rows)
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["paper", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| Toy, tuned | 0 |" in result.output
    assert (tmp_path / "paper.md").exists()
