"""`bench compare`: which rows belong together, the ratio, its noise, and what cannot be compared."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autolrs_plugin.benchmark.table import Run
from autolrs_plugin.benchmark.table import rows as autolrs_rows
from tests.test_house import ROOT
from vllm_sarathi.benchmark.common.compare import (
    REPEATS,
    alone,
    alone_lines,
    compare_figures,
    compare_table,
    read_figures,
    settings_of,
)
from vllm_sarathi.benchmark.live.contenders import parse_contender
from vllm_sarathi.benchmark.live.rows import build_row
from vllm_sarathi.benchmark.profile.simulator import metric_rows
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import ConfigError


def results(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "rows": rows}))
    return path


def row(workload: str, ttft_ms: float, **more: Any) -> dict[str, Any]:
    return {"workload": workload, "tbt_slo_ms": 250, "ttft_ms": {"mean": ttft_ms, "p50": None}, **more}


def test_rows_are_matched_by_what_they_are_of(tmp_path: Path) -> None:
    old = results(tmp_path / "old/live.json", row("chat", 100), row("mix", 500), row("idle", 1))
    new = results(tmp_path / "new/live.json", row("mix", 400), row("chat", 150))
    found = compare_figures(read_figures(old), read_figures(new))
    assert [(each.row, each.ratio) for each in found] == [
        ("workload chat, tbt_slo_ms 250", 1.5),
        ("workload mix, tbt_slo_ms 250", 0.8),
    ]
    assert {each.figure for each in found} == {"ttft_ms.mean"}
    assert [each.noise for each in found] == [None, None]
    assert [each.changed for each in found] == [None, None]


def test_the_noise_is_that_of_the_repeats(tmp_path: Path) -> None:
    old = results(tmp_path / "old.json", *(row("chat", v, seed=i) for i, v in enumerate([90, 100, 110])))
    new = results(tmp_path / "new.json", *(row("chat", v, seed=i) for i, v in enumerate([180, 220])))
    (found,) = compare_figures(read_figures(old), read_figures(new))
    assert found.ratio == pytest.approx(2.0)
    assert found.noise == pytest.approx(2 * math.sqrt(0.1**2 / 3 + (math.sqrt(800) / 200) ** 2 / 2))
    assert found.changed


def test_one_run_takes_the_noise_of_the_repeats_beside_it(tmp_path: Path) -> None:
    for day, value in (("a", 95.0), ("b", 105.0)):
        results(tmp_path / "old" / day / "live.json", row("chat", value))
    results(tmp_path / "new/live.json", row("chat", 101.0))
    results(tmp_path / "new/idle.json", row("chat", 101.0))
    (found,) = compare_figures(read_figures(tmp_path / "old"), read_figures(tmp_path / "new"))
    assert found.benchmark == "live"
    spread = math.sqrt(50) / 100
    assert found.noise == pytest.approx(1.01 * math.sqrt(spread**2 / 2 + spread**2))
    assert found.changed is False


def test_what_is_not_above_zero_has_no_ratio(tmp_path: Path) -> None:
    old = results(tmp_path / "old/autolrs.json", {"task": "a", "regret": -0.01})
    new = results(tmp_path / "new/autolrs.json", {"task": "a", "regret": 0.02})
    (found,) = compare_figures(read_figures(old), read_figures(new))
    assert (found.old, found.new, found.ratio) == (-0.01, 0.02, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no results of schema 1"),
        ('{"schema": 2, "rows": []}', "holds no results of schema 1"),
        ('{"schema": 1, "rows": [1]}', "'rows' must be a list of JSON objects"),
    ],
)
def test_what_is_no_result_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "live.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_figures(path)
    assert str(path) in str(caught.value)


def test_in_a_folder_what_has_no_schema_is_passed_over(tmp_path: Path) -> None:
    """`bench live` leaves its clients' raw results below build/bench."""
    good = results(tmp_path / "today/live.json", row("chat", 1))
    raw = tmp_path / "live/short-default.json"
    raw.parent.mkdir()
    raw.write_text('{"duration": 3.0}')
    skipped: list[Path] = []
    assert read_figures(tmp_path, skipped) == {
        ("live", *key[1:]): value for key, value in read_figures(good).items()
    }
    assert skipped == [raw]
    with pytest.raises(ConfigError, match="holds no results of schema 1"):
        read_figures(raw)
    raw.write_text('{"schema": 2, "rows": []}')
    with pytest.raises(ConfigError, match="holds no results of schema 1"):
        read_figures(tmp_path)


def test_what_is_on_one_side_alone_is_said(tmp_path: Path) -> None:
    many = [row(f"chat-{i}", 1) for i in range(5)]
    results(tmp_path / "old/live.json", row("mix", 1, attainment=1.0), *many)
    results(tmp_path / "old/paper.json", row("chat", 1))
    results(tmp_path / "new/live.json", row("mix", 2))
    old, new = read_figures(tmp_path / "old"), read_figures(tmp_path / "new")
    assert alone_lines("NEW", alone(new, old)) == ["in NEW alone: nothing"]
    only = alone(old, new)
    assert [len(each.figures) for each in only] == [1] * 7
    assert alone_lines("OLD", only) == [
        "in OLD alone: 7 figures in 7 rows",
        "  live: workload mix, tbt_slo_ms 250 (attainment); workload chat-0, tbt_slo_ms 250 (ttft_ms.mean); "
        "workload chat-1, tbt_slo_ms 250 (ttft_ms.mean); and 3 more",
        "  paper: all of its 1 row",
    ]


def test_what_was_zero_comes_first_by_its_change(tmp_path: Path) -> None:
    before = {"task": "a", "failed": 0, "lost": 0, "same": 0, "ttft": 1.0}
    old = results(tmp_path / "old.json", before)
    new = results(tmp_path / "new.json", before | {"failed": 2, "lost": 9, "ttft": 50.0})
    table = compare_table(compare_figures(read_figures(old), read_figures(new)))
    assert list(table.columns[0].cells) == ["lost: task a", "failed: task a", "ttft: task a", "same: task a"]


def test_what_made_a_file_is_no_part_of_what_it_holds(tmp_path: Path) -> None:
    """The demo's file has `runs`, and no command; that of the baseline says its command."""
    runs = {"default": {"ttft_ms": {"mean": 4.0}}}
    files = []
    for name, more in (("old", {"commands": ["vllm-sarathi demo"]}), ("new", {})):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"schema": 1, **more, "runs": runs}))
    (found,) = compare_figures(*map(read_figures, files))
    assert (found.row, found.figure) == ("", "runs.default.ttft_ms.mean")


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no result file"):
        read_figures(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_figures(tmp_path / "gone.json")
    live = results(tmp_path / "live.json", row("chat", 1))
    other = results(tmp_path / "paper.json", row("mix", 1))
    with pytest.raises(ConfigError, match="no figure in common"):
        compare_figures(read_figures(live), read_figures(other))


def test_the_command(tmp_path: Path) -> None:
    old = results(tmp_path / "old/live.json", row("chat", 100), row("mix", 1))
    new = results(tmp_path / "new/live.json", row("chat", 150))
    done = CliRunner().invoke(
        app, ["bench", "compare", str(old), str(new), "--json", str(tmp_path / "c.json")]
    )
    assert done.exit_code == 0, done.output
    assert "…" not in done.output, "a name was cut off"
    held = json.loads((tmp_path / "c.json").read_text())
    (written,) = held["rows"]
    assert written["ratio"] == 1.5
    assert held["only_new"] == []
    assert held["only_old"] == [
        {"benchmark": "", "row": "workload mix, tbt_slo_ms 250", "figures": ["ttft_ms.mean"], "whole": False}
    ]
    assert "in OLD alone: 1 figure in 1 row" in done.output
    failed = CliRunner().invoke(app, ["bench", "compare", str(old), str(tmp_path / "gone.json")])
    assert failed.exit_code == 1
    assert "gone.json: cannot be read" in failed.output


def names_in(row: dict[str, Any]) -> set[str]:
    return {name for name, _ in settings_of(row)}


def test_the_baselines_match_what_the_benchmarks_write() -> None:
    """Else nothing would be found in common."""
    run = Run("lee-gru", "autolrs", 0, 1e-3, 1.0, 200, 20, 3.0, [], {}, first_val_loss=2.0)
    figures = {"gap_ms": {"p50": 1.0, "p99": 1.0}, "ttft_ms": {"mean": 1.0, "p90": 1.0}}
    written = {
        "live": build_row("chat", 250.0, parse_contender("default@256"), []),
        "autolrs": autolrs_rows([run])[0],
        "validate": metric_rows(
            "sarathi", [{**figures, "output_tokens_per_s": 1.0}], [{**figures, "output_tokens_per_s": 1.0}]
        )[0],
    }
    for name, new in written.items():
        rows = json.loads((ROOT / f"bench/baselines/{name}.json").read_text())["rows"]
        assert names_in(new) in [names_in(row) for row in rows], name


BASELINES = sorted((ROOT / "bench/baselines").glob("*.json"))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_says_what_made_it_and_compares_with_itself(path: Path) -> None:
    held = json.loads(path.read_text())
    assert {command.split()[0] for command in held["commands"]} <= {"vllm-sarathi", "autolrs"}
    assert held["commands"]
    figures = read_figures(path)
    same = [(*settings_of(row), *((name, row.get(name)) for name in REPEATS)) for row in held.get("rows", [])]
    assert len(set(same)) == len(same), "two rows are of the same thing, and not repeats of it"
    assert all(each.ratio in (1.0, None) for each in compare_figures(figures, figures))
