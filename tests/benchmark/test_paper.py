"""The paper's evaluation on a tiny grid, and the SLO of a pace as a criterion."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_sarathi.benchmark.capacity.search import Criterion
from vllm_sarathi.benchmark.paper import report as paper_report
from vllm_sarathi.benchmark.paper import runs as paper
from vllm_sarathi.cli import app
from vllm_sarathi.simulation.outcome import Outcome, paces
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

TINY = paper.Scale(8, 1, 0.3, (100.0,), sweep=True)


def here(
    function: Callable[[Any], Any], inputs: Sequence[Any], done: Callable[[int, Any], None], **_: Any
) -> list[Any]:
    """Run all in this process."""
    outputs = []
    for index, value in enumerate(inputs):
        outputs.append(function(value))
        done(index, outputs[-1])
    return outputs


def guessed(cell: paper.Cell) -> dict[str, Any]:
    """Return a row without a search: sarathi carries twice what the others do; orca nothing where it is strict."""
    task = cell.tasks[0]
    about = {"table": cell.table, "label": cell.label}
    if cell.table == "ablation":
        figures = {"ttft_ms": {"p50": 760.0}, "gap_ms": {"p99": 140.0}}
        return {**about, "scheduler": task.scheduler, "rate_qps": 1.0, **figures}
    name, _, budget = task.scheduler.partition("@")
    qps = 2.0 if name == "sarathi" else None if (name, cell.label) == ("orca", "strict") else 1.0
    return {
        **about,
        "deployment": task.deployment,
        "workload": task.workload.name,
        "tbt_slo_ms": task.criterion.tbt_slo_ms,
        "scheduler": name,
        "token_budget": int(budget) if budget else None,
        "capacity_qps": qps,
    }


def test_the_grid_is_the_papers() -> None:
    cells = paper.cells_of(paper.FULL)
    assert sum(cell.table == "capacity" for cell in cells) == 4 * 2 * 2 * 5
    assert sum(cell.table == "sweep" for cell in cells) == 4 * 2 * 2 * 8
    assert len({cell.name for cell in cells}) == len(cells)
    names = {task.deployment for cell in cells for task in cell.tasks}
    assert names == {place.name for place in paper.DEPLOYMENTS} | {paper.TENSOR}
    assert all(len(cell.tasks) == paper.FULL.seeds for cell in cells if cell.table != "ablation")


def test_a_cell_of_another_scale_is_another_cell() -> None:
    full, quick = (
        {cell.name for cell in paper.cells_of(scale) if cell.table != "ablation"}
        for scale in (paper.FULL, paper.QUICK)
    )
    assert not full & quick


def test_what_was_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = paper.cells_of(TINY)[:6]
    ran: list[str] = []

    def measure(cell: paper.Cell) -> dict[str, Any]:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return guessed(cell)

    monkeypatch.setattr(paper, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        paper.rows_of(cells, tmp_path, here)
    half = list(ran)
    (tmp_path / f"{half[0]}.json").write_text("{half a row")  # as a full disk leaves one
    ran.clear()
    rows = paper.rows_of(cells, tmp_path, here)
    assert sorted(ran) == sorted([half[0], *(cell.name for cell in cells if cell.name not in half)])
    assert [row["scheduler"] for row in rows] == [c.tasks[0].scheduler.partition("@")[0] for c in cells]


def test_the_report_has_each_table_beside_the_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "measure", guessed)
    rows = paper.rows_of(paper.cells_of(TINY), tmp_path / "cells", here)
    tables = paper_report.tables_of(rows)
    files = paper_report.write_report(tables, tmp_path, 8, 1)
    assert {f.name for f in files} >= {
        "report.md",
        "capacity.csv",
        "published.csv",
        "capacity.png",
        "tradeoff.png",
    }
    assert all(f.stat().st_size > 100 for f in files)
    with (tmp_path / "published.csv").open(encoding="utf-8") as file:
        published = {row["figure"]: row for row in csv.DictReader(file)}
    mistral = published["mistral-7b/a100, chat, strict: sarathi over prefill-first"]
    assert float(mistral["measured"]) == 2.0
    assert float(mistral["difference"]) == pytest.approx(2.0 / 2.6 - 1)
    assert published["yi-34b/2xa100, chat, strict: sarathi over orca"]["measured"] == ""  # it carries nothing
    assert float(
        published["yi-34b/2xa100, ablation: sarathi@1024, TBT P99 s"]["difference"]
    ) == pytest.approx(0)
    assert len(tables["sweep"]) == 4 * 2 * 2
    assert {row["best_budget"] for row in tables["sweep"]} <= set(paper.SWEPT)
    for row in tables["sweep"]:
        assert row["over_best"] == row["over_pressure"] == 2.0
        assert row["worst_qps"] <= row["best_qps"]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report.count("## ") == len(paper_report.COLUMNS)
    assert "-23%" in report
    assert "| none |" in report


def test_reading_in_chunks_costs_less_the_longer_the_chunk() -> None:
    overhead = {(r["token_budget"], r["prompt_tokens"]): r["overhead"] for r in paper.overhead_rows()}
    assert overhead[512, 2048] > overhead[1024, 2048] > overhead[2048, 2048] == pytest.approx(1.0)
    assert all(1.0 <= o < 1.2 for o in overhead.values())


def test_a_tiny_grid_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "QUICK", TINY)
    some = [
        cell for cell in paper.cells_of(TINY)[:5] if cell.tasks[0].scheduler in ("sarathi", "prefill-first")
    ]
    monkeypatch.setattr(paper, "cells_of", lambda scale: some)
    monkeypatch.setattr(
        "vllm_sarathi.benchmark.common.farm.run_all", lambda f, i, console, ray, done: here(f, i, done)
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["paper", "--quick", "--out", str(out), "--json", str(tmp_path / "rows.json")]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert rows["schema"] == 1
    carried = [r for r in rows["rows"] if r.get("scheduler") == "sarathi"]
    assert len(carried) == 1
    assert all(r["capacity_qps"] > 0 for r in carried)


# --- Pace ---


def log_of(token_s: list[float]) -> RequestLog:
    return RequestLog(SimulatedRequest(0.0, 10, len(token_s)), 0.0, token_s, True)


def test_a_stream_that_was_ahead_may_pause() -> None:
    token_s = [1.0, 1.05, 1.10, 1.40]  # the last gap is 0.3 s, and due at 1.0 + 3 x 0.15
    assert paces(log_of(token_s)) == pytest.approx([0.05, 0.05, 0.4 / 3])
    assert len(paces(log_of([1.0]))) == len(paces(log_of([]))) == 0
    outcome = Outcome(
        np.diff(token_s),
        np.array([1.0]),
        np.array([0.0]),
        np.array([], dtype=bool),
        1,
        1,
        1.0,
        paces(log_of(token_s)),
    )
    assert not Criterion(150.0).holds(outcome)
    assert Criterion(150.0, tbt_mode="pace").holds(outcome)
    assert not Criterion(130.0, tbt_mode="pace").holds(outcome)
