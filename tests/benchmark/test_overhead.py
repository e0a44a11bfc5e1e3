"""The overhead benchmark: that it measures what it says, never how long that took."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_sarathi.benchmark.profile import overhead
from vllm_sarathi.benchmark.profile.overhead import Overhead, measure_overhead
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import SarathiConfig

pytest.importorskip("vllm")


@pytest.mark.parametrize("config", [SarathiConfig(token_budget=512), SarathiConfig(tbt_slo_ms=50)])
def test_the_overhead_is_measured_on_the_scene_it_names(config: SarathiConfig) -> None:
    result = asdict(measure_overhead(config, running=8, waiting=2, steps=5))
    assert set(result) == {"running", "waiting", "parent_us", "ours_us", "ratio"}
    assert (result["running"], result["waiting"]) == (8, 2)
    assert result["ours_us"] > 0
    assert result["parent_us"] > 0
    assert result["ratio"] == pytest.approx(result["ours_us"] / result["parent_us"])


def test_the_command_writes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "measure_overhead", lambda *_: Overhead(8, 2, 100.0, 10.0, 0.1))
    path = tmp_path / "new/overhead.json"
    done = CliRunner().invoke(app, ["bench", "overhead", "--json", str(path)])
    assert done.exit_code == 0, done.output
    asked = {"prefill_order": "fcfs", "classes": False}
    row = {**asked, "running": 8, "waiting": 2, "parent_us": 100.0, "ours_us": 10.0, "ratio": 0.1}
    assert json.loads(path.read_text()) == {"schema": 1, "rows": [row]}
