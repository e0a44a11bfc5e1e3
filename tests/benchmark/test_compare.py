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
from vllm_sarathi.benchmark.common.compare import compare_figures, read_figures, settings_of
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
    old = results(tmp_path / "old/live.json", row("chat", 100))
    new = results(tmp_path / "new/live.json", row("chat", 150))
    done = CliRunner().invoke(
        app, ["bench", "compare", str(old), str(new), "--json", str(tmp_path / "c.json")]
    )
    assert done.exit_code == 0, done.output
    assert "…" not in done.output, "a name was cut off"
    (written,) = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert written["ratio"] == 1.5
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
    assert held["command"].split()[0] in ("vllm-sarathi", "autolrs")
    figures = read_figures(path)
    assert all(len(values) == 1 for values in figures.values()), "two rows are of the same thing"
    assert all(each.ratio in (1.0, None) for each in compare_figures(figures, figures))
