"""Measured servers: which rows are read, which are left out and why, and how a row is simulated."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_sarathi.benchmark.profile import silicon, silicon_fit
from vllm_sarathi.benchmark.profile.silicon_sample import SAMPLE as SAMPLE_FILE
from vllm_sarathi.benchmark.profile.silicon_sample import SiliconRow, left_out, queued, read_sample
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.placement import memory_share

pytest.importorskip("aiconfigurator_core")

SAMPLE = read_sample()
LLAMA = SiliconRow(
    name="llama_c8_tp4_1",
    model="meta-llama/Llama-3.1-70B",
    system="h200_sxm",
    precision="fp8",
    tensor_parallel=4,
    experts_over=4,
    expert_parallel=False,
    engines=1,
    aggregated=True,
    concurrency=8,
    prompt_tokens=1024,
    output_tokens=128,
    version="0.19.0",
    ranged=True,
    ttft_ms=100.0,
    tpot_ms=12.0,
)


def test_the_sample_is_read_as_it_is() -> None:
    assert len(SAMPLE) == 1345
    by_name = {row.name: row for row in SAMPLE}
    row = by_name["minimaxm2_5_b300_vllm_fp8_agg_8192x1024_c128_cfg733"]
    assert (row.concurrency, row.prompt_tokens, row.output_tokens, row.tensor_parallel) == (
        128,
        8192,
        1024,
        4,
    )
    assert row.tpot_ms == pytest.approx(33.4429, abs=1e-4)
    assert (row.judging, row.ranged, row.asynchronous) == (True, True, True)
    old = next(row for row in SAMPLE if row.model == "Qwen/Qwen3-32B" and row.aggregated)
    assert (old.version, old.ranged, old.asynchronous) == ("0.12.0", False, False)


def test_each_row_is_fitted_on_or_judges() -> None:
    judging = [row.name for row in SAMPLE if row.judging]
    assert 0.45 * len(SAMPLE) < len(judging) < 0.55 * len(SAMPLE)
    assert all(int(name[-1]) % 2 == 1 for name in judging)


def test_every_row_is_there_or_has_its_reason() -> None:
    reasons = left_out(SAMPLE)
    assert 100 < len(reasons) < 0.15 * len(SAMPLE)
    by_name = {row.name: row for row in SAMPLE}
    other_load = {name for name, why in reasons.items() if "their load was another one" in why}
    assert {by_name[name].model for name in other_load} == {"nvidia/Llama-3.1-8B-Instruct-FP8"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregated": False}, "on other devices"),
        ({"concurrency": 0}, "states no concurrency"),
        ({"engines": 4}, "4 engines with a scheduler each"),
        ({"experts_over": 2}, "experts over 2 are not one engine"),
    ],
)
def test_a_load_that_cannot_be_is_said(changes: dict[str, Any], said: str) -> None:
    (reason,) = left_out([replace(LLAMA, **changes)]).values()
    assert said in reason


def test_a_row_beyond_the_data_sheet_is_left_out() -> None:
    # 70.6e9 bytes over 4 x 4.8e12 bytes/s.
    quick, slow = (replace(LLAMA, name=f"r_{ms}_1", tpot_ms=ms) for ms in (3.6, 3.8 + 1.7))
    others = [replace(LLAMA, name=f"s_{i}_1") for i in range(20)]
    assert list(left_out([quick, slow, *others])) == [quick.name]
    # A tenth of the rows says that none of them had the load that is stated.
    assert len(left_out([quick, slow])) == 2


def test_more_clients_do_not_make_a_server_quicker() -> None:
    more = replace(LLAMA, name="more_1", concurrency=16, tpot_ms=10.0)
    reasons = left_out([LLAMA, more])
    assert list(reasons) == [LLAMA.name]
    assert "has 10.0 ms for 16" in reasons[LLAMA.name]
    assert not left_out([LLAMA, replace(more, version="0.18.0")])


def test_who_waits_longer_than_all_prompts_take_was_not_in_the_engine() -> None:
    assert queued(LLAMA, 0.05) is None
    assert "fewer were in the engine" in str(queued(replace(LLAMA, ttft_ms=700.0), 0.05))


def test_lengths_are_drawn_as_the_harness_draws_them() -> None:
    drawn = silicon.requests_of(LLAMA, 400)
    prompts = [request.prompt_tokens for request in drawn]
    assert 819 <= min(prompts) < 840 < 1000 < max(prompts) <= 1024
    assert {r.prompt_tokens for r in silicon.requests_of(replace(LLAMA, ranged=False), 9)} == {1024}


def test_a_row_is_simulated_in_a_closed_loop() -> None:
    few = silicon.simulate(LLAMA)
    assert few["source"] == "measured"
    assert 6.0 < few["tpot_ms"] < 16.0
    more = silicon.simulate(replace(LLAMA, concurrency=32))
    assert more["tpot_ms"] > 1.3 * few["tpot_ms"]
    late = silicon.simulate(replace(LLAMA, ttft_ms=60_000.0))
    assert "fewer were in the engine" in late["left_out"]


def test_a_synchronous_host_is_not_hidden() -> None:
    old = replace(LLAMA, version="0.12.0", ranged=False)
    new = replace(old, version="0.19.0")
    assert silicon.simulate(old)["tpot_ms"] > silicon.simulate(new)["tpot_ms"] + 0.3


def test_a_place_that_does_not_fit_is_left_out_with_the_arithmetic() -> None:
    reason = silicon.simulate(replace(LLAMA, system="h100_sxm", precision="", tensor_parallel=1))["left_out"]
    assert f"does not fit: {memory_share():.0%} of 85 GB" in reason


def test_the_fit_finds_constants_again() -> None:
    rng = np.random.default_rng(0)
    true = {"gemm hopper fp8": 1.1, "moe hopper fp8": 0.9, "shared_layer_us": 8.0}
    most = {"gemm hopper fp8": 9.0, "moe hopper fp8": 9.0, "shared_layer_us": 0.1}
    table = [{key: rng.uniform(0, top) for key, top in most.items()} for _ in range(200)]
    measured = np.array([sum(true[key] * value for key, value in row.items()) for row in table])
    measured[::20] *= 3.0  # disturbed rows do not matter
    found = silicon_fit.solve(table, measured)
    for key, value in true.items():
        assert found[key] == pytest.approx(value, rel=0.05)


def test_the_fit_never_looks_at_a_judging_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        silicon_fit, "features", lambda row, *_: seen.append(row.name) or {"gemm": row.tpot_ms}
    )
    rows = [row for row in SAMPLE if row.model == "meta-llama/Llama-3.1-70B" and row.system == "h200_sxm"]
    silicon_fit.fit(rows)
    assert len(seen) > 20
    assert all(int(name[-1]) % 2 == 0 for name in seen)


# --- The command ---


def test_the_command_writes_the_schema(tmp_path: Path) -> None:
    rows = [row for row in SAMPLE if row.model == "meta-llama/Llama-3.1-70B" and row.concurrency == 4]
    short = next(row for row in rows if row.output_tokens == 1024 and row.tensor_parallel == 4)
    gone = next(row for row in SAMPLE if not row.aggregated)
    (tmp_path / "ids").write_text(f"{short.name}\n{gone.name}\n")
    said = ["validate", "--silicon", "--ids", str(tmp_path / "ids"), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, said, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["schema"] == 1
    first, second = written["rows"]
    assert set(written) == {"schema", "rows"}
    assert set(first) == set(second) == {
        "id", "fitted", "model", "system", "precision", "tp", "concurrency", "isl", "osl", "tpot_ms", "silicon_tpot_ms",
        "ttft_ms", "silicon_ttft_ms", "source", "left_out",
    }  # fmt: skip
    assert first["id"] == short.name
    assert first["left_out"] is None
    assert abs(first["tpot_ms"] / first["silicon_tpot_ms"] - 1) < 0.25
    assert second["tpot_ms"] is None
    assert "on other devices" in second["left_out"]
    assert "left out" in result.output


def test_a_row_is_judged_once_and_apart_from_those_that_were_fitted(tmp_path: Path) -> None:
    judging, fitted = (next(row for row in SAMPLE if row.judging is yes) for yes in (True, False))
    (tmp_path / "ids").write_text(f"{judging.name}\n{fitted.name}\n{judging.name}\n")
    asked = silicon.asked_rows(SAMPLE, tmp_path / "ids", False)
    assert asked == [judging, fitted]
    times = {"tpot_ms": 10.0, "ttft_ms": 100.0, "source": "measured"}
    alike = [replace(row, model="m", system="s", precision="", tensor_parallel=1) for row in asked]
    rows = silicon.judge(alike, {}, lambda _, tasks: [[times] * len(task) for task in tasks])
    assert [row["fitted"] for row in rows] == [False, True]
    names = list(silicon.silicon_table(rows).columns[0].cells)
    assert sorted(map(str, names)) == ["m", "m, fitted"]
    assert [line.partition(":")[0] for line in silicon.summary_lines(rows)] == ["1 rows", "1 rows, fitted"]


@pytest.mark.parametrize(
    ("text", "said"), [("", "names no row"), ("minimax_1\n", "no row 'minimax_1' of vLLM")]
)
def test_a_file_of_ids_is_checked(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(ConfigError, match=said):
        silicon.asked_rows(SAMPLE, tmp_path / "ids", False)


def test_a_file_of_ids_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary", "UTF-8"),
    ):
        with pytest.raises(ConfigError, match=f"--ids {path}: cannot be read: .*{said}"):
            silicon.asked_rows(SAMPLE, path, False)


def test_ids_without_silicon_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["validate", "--ids", str(tmp_path / "ids")])
    assert result.exit_code == 1
    assert "--ids: has no effect without --silicon" in result.output
    result = CliRunner().invoke(app, ["validate", "--silicon", "--all", "--ids", str(tmp_path / "ids")])
    assert result.exit_code == 1
    assert "--all: has no effect with --ids" in result.output


def test_a_few_of_each_group_or_all() -> None:
    some, every = (silicon.asked_rows(SAMPLE, None, all_of_them) for all_of_them in (False, True))
    assert all(row.judging for row in every)
    assert len(every) == sum(row.judging for row in SAMPLE)
    assert {row.group for row in some} == {row.group for row in every}
    assert len(some) <= silicon.SOME_ROWS * len({row.group for row in every})


def test_a_sample_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    with silicon_file().open() as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row for row in rows[:3])
    assert [row.name for row in read_sample(path)] == [row["id"] for row in rows[:3]]


def silicon_file() -> Path:
    import aiconfigurator_core

    return Path(aiconfigurator_core.__file__).parent.joinpath(*SAMPLE_FILE)
