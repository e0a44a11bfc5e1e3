"""`autolrs bench-find`: what counts as right, and the figures below the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autolrs_plugin.benchmark.finding import FACTOR, Found, finding_table
from autolrs_plugin.benchmark.tasks import TASKS
from autolrs_plugin.cli import app
from tests.autolrs.test_bench import TOY

NEAR = Found("toy", 0, 0.1, 20, 1e-2, 4e-3, 3e-2, True, 3e-2 / FACTOR, "")


def test_right_is_near_and_sure() -> None:
    assert NEAR.right
    assert replace(NEAR, lr=1e-2 / FACTOR * 1.01).right
    assert not replace(NEAR, lr=1e-2 / FACTOR * 0.99).right
    assert not replace(NEAR, lr=1e-2 * FACTOR * 1.01).right
    assert not replace(NEAR, confident=False).right


def test_what_is_wrong_and_sure_is_counted() -> None:
    table = finding_table([NEAR, replace(NEAR, lr=1.0), replace(NEAR, confident=False)])
    assert table.caption == (
        "within a factor of 3: 1 of 3 runs (33%); confident in 2, and wrong in 1 of those"
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)
    out = ["--task", "toy", "--seeds", "2", "--json", str(tmp_path / "f.json"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench-find", *out, "--shares", "0.02,0.3"])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["seed"], row["share"]) for row in rows] == [(0, 0.02), (0, 0.3), (1, 0.02), (1, 0.3)]
    assert [row["confident"] for row in rows if row["share"] == 0.02] == [False, False]
    assert all(0 < row["steps"] <= 60 for row in rows if row["share"] == 0.3)
    refused = CliRunner().invoke(app, ["bench-find", *out, "--shares", "2"])
    assert refused.exit_code == 2
    assert "must be fractions above 0 and at most 1" in refused.output.replace("\n", " ")
