"""The live benchmark: what is run, what is made of the clients' results, and one run for real."""

import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.benchmark.fake_vllm import FAKE
from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live import idle, load, server
from vllm_sarathi.benchmark.live import run as live
from vllm_sarathi.benchmark.live.arrivals import Arrival, draw_arrivals, trace_lines
from vllm_sarathi.benchmark.live.contenders import parse_contender
from vllm_sarathi.benchmark.live.load import Load, prepare, read_result, send
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.rows import RowFile, attainment, build_row
from vllm_sarathi.benchmark.live.run import Options, fit, parse_options, plan_sessions, run_live
from vllm_sarathi.benchmark.live.scale import AS_WRITTEN, Scale, Speeds
from vllm_sarathi.benchmark.live.verdict import print_verdicts, verdict
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.workloads.live import Kind, LiveWorkload
from vllm_sarathi.simulation.workloads.registry import WORKLOADS, live_named

FIELDS = [
    "workload",
    "tbt_slo_ms",
    "scheduler",
    "token_budget",
    "attainment",
    "gap_ms",
    "ttft_ms",
    "requests",
    "completed",
    "output_tokens_per_s",
]
SMALL = LiveWorkload("small", "a few", (Kind(1.0, (5, 40), (4, 8)),), requests=6, rate_per_s=20.0)


def options(tmp_path: Path, **changes: Any) -> Options:
    asked: dict[str, Any] = {
        "workloads": (),
        "tbt_slos_ms": (),
        "schedulers": None,
        "quick": False,
        "ttft_slo_ms": 2000.0,
        "model": "owner/m",
        "out": tmp_path / "out",
        "json": tmp_path / "rows.json",
        "resume": False,
        "seed": 0,
        "neighbour": False,
        "scale": "none",
        "report": None,
    }
    return parse_options(**(asked | changes))


def small_load(tmp_path: Path, *arrivals: Arrival) -> Load:
    return replace(prepare(SMALL, "m", tmp_path), arrivals=arrivals)


def client_result(path: Path, **seen: list[Any]) -> Path:
    path.write_text(json.dumps(seen))
    return path


# --- What is asked for ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "mixx"], "--workload 'mixx': unknown workload; did you mean 'mix'?"),
        (["--tbt-slo-ms", "0"], "--tbt-slo-ms 0.0: must be a number of milliseconds"),
        (["--tbt-slo-ms", "nan"], "--tbt-slo-ms nan: must be"),
        (["--seed", "-1"], "--seed -1: must be 0 or more."),
        (["--ttft-slo-ms", "-1"], "--ttft-slo-ms -1.0: must be"),
        (["--schedulers", "sarathi,defualt"], "'defualt': unknown scheduler; did you mean 'default'?"),
        (["--schedulers", "default@x"], "'default@x': the budget after '@' must be a whole number"),
        (["--model", "./nowhere/model"], "--model ./nowhere/model: no such folder"),
        (
            ["--model", "nofolder"],
            "--model nofolder: no such folder, and no name on a model hub (OWNER/NAME)",
        ),
        (["--model", "a/b/c"], "--model a/b/c: no such folder"),
        (["--scale", "autp"], "--scale 'autp': unknown; did you mean 'auto'?"),
        (["--report", "."], "--report .: is a folder; give the name of a file."),
        (["--capacity", "--scale", "auto"], "--capacity: searches its own rate; --scale and --report"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_server_starts(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(live, "run_live", lambda *_: pytest.fail("it ran"))
    result = CliRunner().invoke(app, ["bench", "live", "--model", "owner/m", *arguments])
    assert result.exit_code == 1
    assert f"error: {said}" in result.output.replace("--schedulers '", "'")


def test_another_seed_draws_other_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "plan_sessions", lambda _: [])
    drawn = []
    for seed in (0, 3):
        live.run_live(options(tmp_path, workloads=("short",), seed=seed), Console(quiet=True))
        drawn.append((tmp_path / "out" / "short.trace.jsonl").read_text())
    assert drawn == [trace_lines(draw_arrivals(live_named("short"), seed)) for seed in (0, 3)]
    assert drawn[0] != drawn[1]


def test_everything_is_the_default(tmp_path: Path) -> None:
    asked = options(tmp_path)
    assert asked.workloads == ("short", "long", "mix", "rush", "burst", "idle")
    assert asked.tbt_slos_ms == (150, 250, 500)
    sessions = plan_sessions(asked)
    stock = [session for session in sessions if session.contender.is_stock]
    ours = [session for session in sessions if not session.contender.is_stock]
    assert len(stock) == 6
    assert all(session.workloads == ("short", "long", "mix", "rush", "burst") for session in stock)
    assert all(session.tbt_slo_ms is None for session in stock)
    assert all(len(session.workloads) == 1 for session in ours)
    assert sum(session.contender.label == "sarathi" for session in ours) == 5 * 3
    deadline = [session for session in ours if session.contender.label == "sarathi-deadline"]
    assert [(session.workloads, session.tbt_slo_ms) for session in deadline] == [
        ((workload,), slo_ms) for workload in ("mix", "rush") for slo_ms in (150, 250, 500)
    ]


def test_who_is_named_runs_everywhere(tmp_path: Path) -> None:
    asked = options(tmp_path, schedulers="sarathi-deadline,sarathi@64", workloads=("short",))
    assert [(each.contender.label, each.tbt_slo_ms) for each in plan_sessions(asked)] == [
        ("sarathi-deadline", 150),
        ("sarathi-deadline", 250),
        ("sarathi-deadline", 500),
        ("sarathi@64", None),
    ]


def test_no_two_runs_share_a_result(tmp_path: Path) -> None:
    asked = options(tmp_path)
    results = [
        session.result(workload, asked.out)
        for session in plan_sessions(asked)
        for workload in session.workloads
    ]
    assert len(set(results)) == len(results) == 6 * 5 + 5 * 3 + 6


# --- What is made of the clients' results ---


def test_a_result_becomes_streams_also_where_requests_failed(tmp_path: Path) -> None:
    arrivals = (Arrival(0, 5, 3), Arrival(1, 6, 4), Arrival(2, 7, 2), Arrival(3, 8, 9))
    result = client_result(
        tmp_path / "r.json",
        start_times=[100.0, 101.0, 102.0, 103.0],
        ttfts=[0.5, 0.25, 0.0, 1.0],
        itls=[[0.1, 0.2], [0.3], [], [0.1]],
        output_lens=[3, 0, 0, 2],
        errors=["", "the connection broke off", "HTTP 500", ""],
    )
    whole, broken, refused, short = read_result(result, small_load(tmp_path, *arrivals))
    assert whole.error is None
    assert [delivery.at_s for delivery in whole.deliveries] == pytest.approx([0.5, 0.6, 0.8])
    assert whole.ttft_s == pytest.approx(0.5)
    assert broken.error == "the connection broke off"
    assert broken.gaps_s == pytest.approx([0.3])
    assert broken.output_tokens == 2
    assert (refused.error, refused.deliveries, refused.ttft_s) == ("HTTP 500", (), None)
    assert short.error == "2 tokens came instead of 9"

    row = build_row("short", 150.0, parse_contender("default@80"), [whole, broken, refused, short])
    assert list(row) == FIELDS
    assert (row["scheduler"], row["token_budget"]) == ("default@80", 80)
    assert row["attainment"] == pytest.approx(2 / 4)  # gaps of 100, 200, 300 and 100 ms
    assert (row["requests"], row["completed"]) == (4, 1)
    assert list(row["gap_ms"]) == ["p50", "p90", "p99", "max"]
    assert list(row["ttft_ms"]) == ["mean", "p50", "p90", "p99"]


def test_without_gaps_there_is_nothing_to_judge() -> None:
    assert attainment([], 150.0) is None


def row(scheduler: str, kept: float | None, ttft_s: float, completed: int = 6) -> dict[str, Any]:
    return {
        "workload": "mix",
        "tbt_slo_ms": 250.0,
        "scheduler": scheduler,
        "token_budget": None,
        "attainment": kept,
        "gap_ms": {"p50": 1.0, "p90": 1.0, "p99": 1.0, "max": None},
        "ttft_ms": {"mean": ttft_s * 1e3, "p50": 1.0, "p90": 1.0, "p99": 1.0},
        "requests": 6,
        "completed": completed,
        "output_tokens_per_s": 1.0,
    }


def test_the_verdict_is_against_the_best_stock_budget_that_keeps_the_slo() -> None:
    stock = [
        row("default", 0.90, 1.0),  # quickest, but breaks it
        row("default@80", 0.995, 4.0),
        row("default@128", 0.99, 2.0),
        row("default@192", 1.0, 1.5, completed=5),  # did not answer everybody
    ]
    [kept, missed] = verdict("mix", [row("sarathi", 0.99, 1.0), row("sarathi@64", 0.98, 3.0), *stock])
    assert kept == (
        "sarathi: kept (99.00% of gaps kept); mean TTFT 0.50 x that of default@128, "
        "the best of 2 stock budgets that keep it"
    )
    assert missed.startswith("sarathi@64: NOT KEPT (98.00% of gaps kept); mean TTFT 1.50 x")
    [none] = verdict("mix", [row("sarathi", 0.99, 1.0), stock[0]])
    assert none.endswith("none of 1 stock budgets keeps it")


def test_tables_of_rows_with_nothing_in_them_are_printed_too() -> None:
    console = Console(record=True, width=160)
    print_verdicts([row("sarathi", None, 1.0), row("default", 0.5, 1.0)], console)
    said = console.export_text()
    assert "SLO 250 ms between tokens" in said
    assert "nothing to judge" in said


def test_rows_are_in_the_file_as_they_come_and_stay_on_resume_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    RowFile(path, keep=False).add([row("default", 0.5, 1.0), row("sarathi", 0.5, 1.0)])
    resumed = RowFile(path, keep=True)
    resumed.add([row("sarathi", 1.0, 1.0)])
    written = json.loads(path.read_text())
    assert written["schema"] == 1
    assert [(each["scheduler"], each["attainment"]) for each in written["rows"]] == [
        ("default", 0.5),
        ("sarathi", 1.0),
    ]
    RowFile(path, keep=False).add([row("default", 0.7, 1.0)])
    assert [each["attainment"] for each in json.loads(path.read_text())["rows"]] == [0.7]


def test_a_file_without_rows_is_not_overwritten_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"notes": 1}')
    with pytest.raises(RuntimeError, match="holds no rows"):
        RowFile(path, keep=True)
    assert path.read_text() == '{"notes": 1}'


# --- The client as a process ---


def test_a_client_that_fails_is_told_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "vllm_command", lambda *_: [sys.executable, "-c", "exit('no such data set')"])
    with pytest.raises(RuntimeError, match="no such data set"):
        send(prepare(SMALL, "m", tmp_path), "http://127.0.0.1:9", tmp_path / "r.json", env={}, metadata={})
    assert not (tmp_path / "r.json").exists()


def test_an_interrupt_ends_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys, time; open(os.environ['PIDS'], 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(load, "vllm_command", lambda *_: [sys.executable, "-c", script])
    pids = tmp_path / "pids"

    def interrupt(_seconds: float) -> None:
        if pids.exists() and pids.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        send(
            prepare(SMALL, "m", tmp_path),
            "http://127.0.0.1:9",
            tmp_path / "r.json",
            env={"PIDS": str(pids)},
            metadata={},
            while_running=interrupt,
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


# --- Idle ---


def test_idle_asks_both_by_turns_with_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "vllm_command", lambda *_: FAKE)
    with Stages(Console(record=True)) as stages:
        records = idle.run_idle("m", 250.0, 3, tmp_path, stages)
    assert list(records) == ["sarathi", "default"]
    for streams in records.values():
        assert [stream.error for stream in streams] == [None] * 6  # three prompts to each of two servers
        assert all(a.deliveries[-1].at_s <= b.sent_s for a, b in pairwise(streams))
    assert [a.prompt_tokens for a in records["sarathi"]] == [b.prompt_tokens for b in records["default"]]
    assert len({request.prompt[:50] for request in idle.idle_requests(idle.PROMPTS)}) == idle.PROMPTS
    for number, name in enumerate(("sarathi", "default", "default", "sarathi")):
        log = (tmp_path / f"idle-{name}-{number}-250ms.server.log").read_text()
        assert f"--scheduler {name}" in log


def test_the_idle_verdict_is_of_medians() -> None:
    rows = [row("sarathi", 1.0, 9.0), row("default", 1.0, 9.0)]
    rows[0]["ttft_ms"]["p50"] = 1010.0
    rows[1]["ttft_ms"]["p50"] = 1000.0
    assert verdict("idle", rows) == ["median TTFT of a single long prompt: ours +1.0% against stock"]


# --- Scaled to the device ---


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """A device half as fast as the reference, whose servers answer each request with gaps of 400 ms."""
    monkeypatch.setattr(server, "vllm_command", lambda *_: FAKE)
    monkeypatch.setitem(WORKLOADS, "small", SMALL)
    scale = Scale.of(Speeds(500.0, 0.04, 4096, None))
    monkeypatch.setattr(live, "find_scale", lambda *_: scale)

    def send(asked: Load, _url: str, result: Path, *, metadata: dict[str, Any], **_: Any) -> None:
        lengths = [each.output_tokens for each in asked.arrivals]
        client_result(
            result,
            **metadata,
            start_times=[each.at_s for each in asked.arrivals],
            ttfts=[0.5] * len(lengths),
            itls=[[0.4] * (length - 1) for length in lengths],
            output_lens=lengths,
            errors=[""] * len(lengths),
        )

    monkeypatch.setattr(live, "send", send)
    return scale


def scaled_options(folder: Path, **changes: Any) -> Options:
    asked = {
        "workloads": ("small",),
        "tbt_slos_ms": (250.0,),
        "schedulers": "sarathi-deadline,default@160",
        "scale": "auto",
        "report": folder / "report.json",
        "model": "owner/m",
    }
    return options(folder, **(asked | changes))


def test_a_slower_device_has_longer_slos_and_is_asked_less_often(tmp_path: Path, slow_device: Scale) -> None:
    console = Console(record=True, width=200)
    rows = run_live(scaled_options(tmp_path), console)
    assert [(each["scheduler"], each["tbt_slo_ms"], each["attainment"]) for each in rows] == [
        ("sarathi-deadline", 500, 1.0),
        ("default@160", 500, 1.0),
    ]
    arguments = (tmp_path / "out" / "small-sarathi-deadline-500ms.server.log").read_text().splitlines()[0]
    assert "--tbt-slo-ms 500 " in arguments
    assert arguments.endswith("--ttft-slo-ms 4000")
    lines = (tmp_path / "out" / "small.trace.jsonl").read_text().splitlines()
    written = draw_arrivals(SMALL, 0)
    assert [json.loads(line)["timestamp"] for line in lines] == pytest.approx(
        [2 * each.at_s for each in written], abs=2e-3
    )
    told = json.loads((tmp_path / "rows.json").read_text())
    assert list(told) == ["schema", "scale", "rows"]
    assert told["scale"]["measured"]["reading_tokens_per_s"] == 500
    assert told["scale"]["reference"]["reading_tokens_per_s"] == 1000
    assert told["scale"]["factors"] == {"times": 2, "prompts": 1, "requests": 1, "load": 1}
    assert told["scale"]["slos"] == [{"reference_tbt_slo_ms": 250, "tbt_slo_ms": 500}]
    assert told["scale"]["ttft_slo_ms"] == 4000
    assert told["scale"]["workloads"] == [
        {"workload": "small", "requests": 6, "rate_per_s": 10.0, "prompt_tokens": [[5, 40]]}
    ]
    said = " ".join(console.export_text().split())
    assert "SLO 500 ms between tokens (250 on the reference device)" in said
    assert (
        said.count("it prefills 500 tokens/s (reference: 1,000), a decode step takes 40 ms (20); times x 2")
        == 2
    )
    assert "2 servers are started" in said


@pytest.mark.usefixtures("slow_device")
def test_a_report_of_a_run_in_a_folder_with_a_telling_name_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "users" / "telltale"
    tiny_model(folder / "secret-finetune")
    monkeypatch.chdir(folder)
    rows = run_live(scaled_options(folder, model=str(folder / "secret-finetune")), Console(quiet=True))
    text = (folder / "report.json").read_text()
    assert json.loads(text)["rows"] == rows
    assert json.loads(text)["scale"] == json.loads((folder / "rows.json").read_text())["scale"]
    assert not [name for name in ("telltale", "secret-finetune", str(tmp_path)) if name in text]


@pytest.mark.usefixtures("slow_device")
def test_rows_of_two_scales_do_not_share_a_file(tmp_path: Path) -> None:
    run_live(scaled_options(tmp_path), Console(quiet=True))
    before = (tmp_path / "rows.json").read_text()
    run_live(scaled_options(tmp_path, resume=True), Console(quiet=True))
    assert (tmp_path / "rows.json").read_text() == before
    with pytest.raises(RuntimeError, match="its rows are of another --scale"):
        run_live(scaled_options(tmp_path, resume=True, scale="none"), Console(quiet=True))
    assert (tmp_path / "rows.json").read_text() == before


def test_as_written_stays_the_default_and_says_nothing_of_it(tmp_path: Path, slow_device: Scale) -> None:
    console = Console(record=True, width=200)
    [ours, _] = run_live(scaled_options(tmp_path, scale="none", report=None), console)
    assert (ours["tbt_slo_ms"], ours["attainment"]) == (250, 0.0)
    assert list(json.loads((tmp_path / "rows.json").read_text())) == ["schema", "rows"]
    assert "reference" not in console.export_text()


def test_servers_take_prompts_as_long_as_the_scaled_ones(
    tmp_path: Path, slow_device: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "find_scale", lambda *_: Scale.of(Speeds(20000.0, 0.01, 30017, None)))
    monkeypatch.setattr(idle, "QUICK_PROMPTS", 1)
    run_live(
        scaled_options(tmp_path, workloads=("small", "idle"), schedulers="default", quick=True),
        Console(quiet=True),
    )
    logs = list((tmp_path / "out").glob("*.server.log"))
    assert len(logs) == 1 + len(idle.STARTED)
    for log in logs:
        arguments = log.read_text().splitlines()[0].split()
        assert [each for each in arguments if each.startswith("--max-model-len")][
            -1
        ] == "--max-model-len=30017"


def test_budgets_go_with_the_prompts_unless_they_are_named(tmp_path: Path) -> None:
    longer = replace(AS_WRITTEN, prompts=10.0)
    assert [each.label for each in fit(options(tmp_path, quick=True), longer).contenders][-2:] == [
        "default@960",
        "default@1600",
    ]
    named = fit(options(tmp_path, schedulers="default@160"), longer)
    assert [each.label for each in named.contenders] == ["default@160"]


def test_an_slo_of_more_than_an_hour_is_refused_also_when_it_became_so(tmp_path: Path) -> None:
    endless = Scale.of(Speeds(0.1, 200.0, 4096, None))
    with pytest.raises(ConfigError, match="--tbt-slo-ms 5000000"):
        fit(options(tmp_path, tbt_slos_ms=(500.0,)), endless)


# --- For real ---


@pytest.mark.slow
def test_a_real_server_and_a_real_client_make_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setitem(WORKLOADS, "small", SMALL)
    tiny_model(tmp_path / "tiny")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked = options(
        tmp_path, workloads=("small",), schedulers="sarathi@64", model=str(tmp_path / "tiny"), resume=True
    )
    rows = run_live(asked, Console(record=True))

    assert [(each["workload"], each["tbt_slo_ms"]) for each in rows] == [
        ("small", 150),
        ("small", 250),
        ("small", 500),
    ]
    assert all(list(each) == FIELDS for each in rows)
    assert all(each["completed"] == each["requests"] == SMALL.requests for each in rows)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    [result] = (tmp_path / "out").glob("small-sarathi@64.json")
    seen = json.loads(result.read_text())
    arrivals = prepare(SMALL, asked.model, asked.out).arrivals
    assert seen["input_lens"] == [each.prompt_tokens for each in arrivals]
    assert seen["output_lens"] == [each.output_tokens for each in arrivals]
    # On a busy machine tokens may come to the client together, even all of a request's: fewer gaps.
    assert any(seen["itls"])
    assert all(len(gaps) < n for gaps, n in zip(seen["itls"], seen["output_lens"], strict=True))

    # Finished runs are not repeated, whichever SLO judges them; another load's are not taken for ours.
    monkeypatch.setattr(live, "serve", lambda *_, **__: pytest.fail("a finished run was repeated"))
    again = run_live(replace(asked, tbt_slos_ms=(0.1,)), Console(record=True))
    assert [each["tbt_slo_ms"] for each in again] == [0.1, 150, 250, 500]
    assert again[0]["attainment"] < again[1]["attainment"]
    monkeypatch.setitem(WORKLOADS, "small", replace(SMALL, requests=7))
    with pytest.raises(BaseException, match="a finished run was repeated"):
        run_live(asked, Console(record=True))
