"""`fleet` as a user calls it: rows, a table, processes, and what a mistake is told."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_sarathi.benchmark.capacity import fleet as benchmark
from vllm_sarathi.benchmark.common.lines import open_lines
from vllm_sarathi.cli import app
from vllm_sarathi.simulation.fleet.fleet import Fleet, FleetSpec
from vllm_sarathi.simulation.fleet.group import Here, ReplicaSpec
from vllm_sarathi.simulation.workloads.registry import synthetic

PLACE = ["--deployment", "mistral-7b/a100", "--requests", "24", "--rate", "4"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["fleet", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything run in this process."""
    monkeypatch.setattr(benchmark, "open_lines", lambda *_: nullcontext([Here()]))


def test_a_row_for_the_fleet_and_for_each_replica(here: None, tmp_path: Path) -> None:
    done = invoke(
        *PLACE, "--replicas", 2, "--router", "first-token", "--fail", "0@2", "--add", 3,
        "--ttft-slo-ms", 2000, "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["schema"] == 1
    whole, *replicas = written["rows"]
    assert [row["replica"] for row in written["rows"]] == ["fleet", 0, 1, 2]
    assert whole["completed"] == whole["requests"] == sum(row["requests"] for row in replicas) == 24
    assert whole["lost"] == 0
    assert whole["asked_qps"] == 4.0
    assert f"chat, 4 (as drawn {whole['rate_qps']:.4g}) requests/s" in done.output
    assert whole["rerouted"] > 0
    assert whole["imbalance"] > 1
    assert 0 <= whole["request_attainment"] <= 1
    assert set(whole["gap_ms"]) == {"p50", "p90", "p99", "max"}
    assert "first-token" in done.output
    assert "rerouted" in done.output


def test_classes_and_roles_have_rows(here: None, tmp_path: Path) -> None:
    done = invoke(
        *PLACE, "--workload", "classes", "--replicas", 1, "--prefill-replicas", 1, "--set",
        "allow_request_slo=true", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["class"] for row in rows if row["replica"] == "fleet"} == {
        None,
        "interactive",
        "normal",
        "batch",
    }
    assert [row["role"] for row in rows if row["replica"] != "fleet"] == ["prefill", "decode"]
    assert rows[0]["requests"] == sum(row["requests"] for row in rows[1:4]) == 24


def test_processes_answer_as_one_process_does() -> None:
    serving = ReplicaSpec("mistral-7b/a100", "sarathi", (("tbt_slo_ms", 60.0),))
    spec = FleetSpec(("serve",) * 2, {"serve": serving}, "least-tokens", 100_000)
    requests = synthetic("chat", 4.0, 16, seed=0)
    alone = Fleet(spec, [Here()]).run(requests)
    with open_lines(2) as lines:
        apart = Fleet(spec, lines).run(requests)
    mapped = [
        [(e.replica, {k: t.to_mapping() for k, t in e.by_kind.items()}) for e in result.ended]
        for result in (alone, apart)
    ]
    assert mapped[0] == mapped[1]


def test_an_error_of_a_process_comes_back_as_it_is() -> None:
    serving = ReplicaSpec("mistral-7b/a100000", "sarathi")
    with open_lines(2) as lines, pytest.raises(ValueError, match="unknown device 'a100000'"):
        Fleet(FleetSpec(("serve",) * 2, {"serve": serving}, "round-robin", 1), lines)


@pytest.mark.slow
def test_ray_answers_as_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    start = ray.init
    small = {"num_cpus": 2, "object_store_memory": 200 * 2**20}
    monkeypatch.setattr(ray, "init", lambda **options: start(**options, **small))
    serving = ReplicaSpec("mistral-7b/a100", "sarathi", (("tbt_slo_ms", 60.0),))
    spec = FleetSpec(("serve",) * 3, {"serve": serving}, "first-token", 100_000)
    requests = [replace(r, ttft_slo_ms=2000.0) for r in synthetic("chat", 4.0, 16, seed=0)]
    alone = Fleet(spec, [Here()]).run(requests)
    apart = benchmark.run_fleet(spec, requests, ray="local")
    for one, other in zip(alone.ended, apart.ended, strict=True):
        assert {k: t.to_mapping() for k, t in one.by_kind.items()} == {
            k: t.to_mapping() for k, t in other.by_kind.items()
        }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--router", "robin"], "--router 'robin': unknown"),
        (["--replicas", 0], "--replicas 0: must be"),
        (["--replicas", 9999], "--replicas 9999: at most 4096"),
        (["--prefill-replicas", -1], "--prefill-replicas -1: must be"),
        (["--fail", "2"], "--fail '2': must be REPLICA@SECONDS"),
        (["--fail", "x@3"], "--fail 'x@3': must be REPLICA@SECONDS"),
        (["--fail", "2@3"], "there is no replica 2 then"),
        (["--fail", "1@3", "--fail", "1@4"], "there is no replica 1 then"),
        (["--add", "soon"], "--add 'soon': must be SECONDS"),
        (["--add", "decode@3"], "the roles here are serve"),
        (["--on-failure", "retry"], "'retry'"),
        (["--link-gbps", 0], "--link-gbps 0.0: must be above 0"),
        (["--link-gbps", 100], "--link-gbps: has no effect without --prefill-replicas"),
        (["--requests", 10**12], "--requests 1000000000000: at most 10,000,000"),
        (["--refresh-ms", -1], "--refresh-ms -1.0: must be"),
        (["--prefill-deployment", "mistral-7b/h100"], "has no effect without --prefill-replicas"),
        (
            ["--prefill-replicas", 1, "--prefill-deployment", "yi-34b/2xa100"],
            "must be of the same model as",
        ),
        (
            ["--prefill-replicas", 1, "--prefill-deployment", "mistral-7b/a100:kvfp8"],
            "its KV cache has another precision than that of 'mistral-7b/a100'",
        ),
        (
            ["--prefill-replicas", 1, "--prefill-deployment", "mistral-7b/a1000"],
            "--prefill-deployment: unknown device 'a1000'; did you mean 'a100'",
        ),
        (["--router", "first-token", "--scheduler", "default"], "vLLM's own scheduler has no answer"),
        (["--scheduler", "orka"], "unknown scheduler; did you mean 'orca'"),
        (["--ttft-slo-ms", 0], "--ttft-slo-ms 0.0: must be"),
    ],
)
def test_a_mistake_is_one_sentence(here: None, arguments: list[Any], said: str) -> None:
    done = invoke(*PLACE, *arguments)
    assert done.exit_code == 1
    assert said in " ".join(done.output.split())
