"""`simulate` and `capacity` as a user calls them: rows, tables, pictures, and what a mistake is told."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_sarathi.benchmark.capacity import simulated
from vllm_sarathi.benchmark.capacity.search import Found
from vllm_sarathi.benchmark.common import farm
from vllm_sarathi.cli import app
from vllm_sarathi.cli.options import LoadOptions
from vllm_sarathi.simulation.devices.disturbed import Disturbance

PLACE = ["--deployment", "mistral-7b/a100"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let everything run in this process, and return what `run_all` was asked for."""
    asked: dict[str, Any] = {}

    def run_all(function: Callable[[Any], Any], inputs: Sequence[Any], **options: Any) -> list[Any]:
        asked.update(options, inputs=inputs)
        return [function(value) for value in inputs]

    monkeypatch.setattr(farm, "run_all", run_all)
    return asked


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing run: a mistake has to be found before."""
    monkeypatch.setattr(farm, "run_all", lambda *_, **__: pytest.fail("it ran"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


@pytest.mark.parametrize(
    ("file", "said"),
    [(".", r"is a folder; give the name of a file"), ("taken/rows.json", "cannot be written, because")],
)
@pytest.mark.parametrize("option", ["--json", "--save-trace"])
def test_a_file_that_cannot_be_written_is_told_of_before_anything_runs(
    option: str, file: str, said: str, nowhere: None, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    done = invoke("simulate", *PLACE, "--rate", 2, option, tmp_path / file)
    assert done.exit_code == 2
    assert said in done.output


def test_simulate_writes_a_row_for_each_scheduler_and_seed(here: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    names = "sarathi, default@512,prefill-first,"
    done = invoke(
        "simulate", *PLACE, "--rate", 2, "--requests", 12, "--seeds", 2, "--schedulers", names, "--json", path
    )
    assert done.exit_code == 0, done.output
    written = json.loads(path.read_text())
    assert written["schema"] == 1
    rows = written["rows"]
    assert [(r["scheduler"], r["token_budget"], r["seed"]) for r in rows] == [
        ("sarathi", None, 0),
        ("sarathi", None, 1),
        ("default", 512, 0),
        ("default", 512, 1),
        ("prefill-first", None, 0),
        ("prefill-first", None, 1),
    ]
    for row in rows:
        assert (row["deployment"], row["workload"], row["rate_qps"]) == ("mistral-7b/a100", "chat", 2.0)
        assert row["tbt_slo_ms"] == 100.0
        assert row["completed"] == row["requests"] == 12
        assert set(row["gap_ms"]) == {"p50", "p90", "p99", "max"}
        assert set(row["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
        assert row["output_tokens_per_s"] > 0
    assert "default@512" in done.output


def test_a_trace_that_comes_at_once_has_no_rate(here: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "3,500,10\n" * 4)
    arguments = [*PLACE, "--trace", trace, "--json", tmp_path / "rows.json"]
    for command in (["simulate", "--schedulers", "default"], ["fleet", "--scheduler", "default"]):
        done = invoke(*command, *arguments)
        assert "all requests at once" in " ".join(done.output.split()), done.output
        row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
        assert row["rate_qps"] is None
    done = invoke("simulate", "--schedulers", "default", *arguments, "--rate", 2)
    assert "2 requests/s" in done.output
    assert (
        json.loads((tmp_path / "rows.json").read_text())["rows"][0]["ttft_ms"]["p99"] < row["ttft_ms"]["p99"]
    )


def test_a_trace_is_played_as_it_is_or_faster(here: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:15:{s:02d}.0000000,{100 + s},5\n" for s in range(0, 50, 5))
    )
    arguments = ["simulate", *PLACE, "--trace", trace, "--trace-format", "azure", "--schedulers", "default"]
    for scale, rate in ((1, 0.2), (4, 0.8)):
        done = invoke(*arguments, "--time-scale", scale, "--json", tmp_path / "rows.json")
        assert done.exit_code == 0, done.output
        [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert row["rate_qps"] == pytest.approx(rate)
        assert row["workload"] == "azure.csv"
    done = invoke(*arguments, "--requests", 4, "--seeds", 2, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["requests"] for row in rows] == [4, 4]
    assert rows[0]["ttft_ms"] != rows[1]["ttft_ms"]  # another piece of the trace


def test_three_classes_have_a_goodput(here: dict[str, Any], tmp_path: Path) -> None:
    done = invoke(
        "simulate", *PLACE, "--rate", 0.2, "--requests", 20, "--workload", "classes",
        "--schedulers", "sarathi", "--set", "prefill_order=deadline", "--set", "allow_request_slo=true",
        "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert 0.5 < row["request_attainment"] <= 1.0
    assert "SLOs met" in done.output
    assert dict(here["inputs"][0].settings) == {
        "tbt_slo_ms": 100.0,
        "prefill_order": "deadline",
        "allow_request_slo": True,
    }


def test_capacity_makes_rows_a_table_and_a_picture(here: dict[str, Any], tmp_path: Path) -> None:
    done = invoke(
        "capacity", *PLACE, "--requests", 10, "--seeds", 2, "--schedulers", "sarathi@512,orca",
        "--tbt-slo-ms", 60, "--json", tmp_path / "rows.json", "--plot", tmp_path / "a" / "b.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["scheduler"], r["token_budget"]) for r in rows] == [("sarathi", 512), ("orca", None)]
    for row in rows:
        low, high = row["ci_qps"]
        assert low <= row["capacity_qps"] <= high
        assert row["gap_ms"]["p99"] <= 60
        assert row["goodput_qps"] is None
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "P99 gap within 60 ms" in done.output
    assert "SLOs met" not in done.output


def test_a_disturbed_device_and_where_its_times_come_from(here: dict[str, Any], tmp_path: Path) -> None:
    run = ["simulate", *PLACE, "--rate", 2, "--requests", 12, "--schedulers", "default"]
    plain = invoke(*run, "--json", tmp_path / "plain.json")
    noisy = invoke(*run, "--noise", 0.1, "--pauses", 20, "--neighbour", 2, "--json", tmp_path / "noisy.json")
    assert plain.exit_code == noisy.exit_code == 0, noisy.output
    assert "step times: roofline, from the device's data sheet" in plain.output
    [quiet], [loud] = (json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in ("plain", "noisy"))
    assert (quiet["source"], quiet["disturbance"]) == ("roofline", "undisturbed")
    assert loud["disturbance"] == "noise 10%, 20 pauses a minute, neighbour x2"
    assert loud["gap_ms"]["p90"] > 1.5 * quiet["gap_ms"]["p90"]


def test_requests_that_share_prefixes_are_read_from_the_cache(here: dict[str, Any], tmp_path: Path) -> None:
    run = ["simulate", *PLACE, "--rate", 0.5, "--requests", 60, "--schedulers", "default"]
    trace = tmp_path / "trace.jsonl"
    done = invoke(*run, "--workload", "mooncake", "--json", tmp_path / "rows.json", "--save-trace", trace)
    assert done.exit_code == 0, done.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    task = here["inputs"][0]
    alone = replace(task, workload=replace(task.workload, trace=tuple(
        replace(request, prefix=()) for request in task.workload.at(0.5, 0)
    )))  # fmt: skip
    unshared = simulated.simulate_row(0.5, alone)
    assert row["ttft_ms"]["mean"] < 0.9 * unshared["ttft_ms"]["mean"]
    # A trace has a rate of its own: the one that the draw came to.
    played = ["simulate", *PLACE, "--trace", trace, "--trace-format", "mooncake", "--schedulers", "default"]
    again = invoke(*played, "--json", tmp_path / "again.json")
    assert again.exit_code == 0, again.output
    [same] = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert same["ttft_ms"]["mean"] == pytest.approx(row["ttft_ms"]["mean"], rel=0.02)


def test_an_slo_that_nobody_can_keep_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    none = Found(None, {"gap_ms": {"p99": 12.3}, "ttft_ms": {"p50": 1.0, "p90": 2.0}})
    monkeypatch.setattr(farm, "run_all", lambda function, inputs, **_: [none] * len(inputs))
    plot = tmp_path / "none.png"
    done = invoke("capacity", *PLACE, "--schedulers", "sarathi", "--tbt-slo-ms", 1, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert "no rate meets it" in done.output
    assert "12" in done.output
    assert plot.exists()


@pytest.mark.parametrize(
    ("words", "address"), [(["--ray"], "local"), (["--ray", "auto"], "auto"), ([], None)]
)
@pytest.mark.parametrize("last", [True, False])
def test_ray_stands_with_an_address_and_without(
    here: dict[str, Any], words: list[str], address: str | None, last: bool
) -> None:
    rest = ["--rate", 1, "--requests", 4, "--schedulers", "default"]
    done = invoke("simulate", *PLACE, *([*rest, *words] if last else [*words, *rest]))
    assert done.exit_code == 0, done.output
    assert here["ray"] == address


CHAT = ["simulate", *PLACE, "--rate", "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", *PLACE], "--rate: is missing"),
        (["simulate", *PLACE, "--rate", "0"], "--rate 0.0: must be a number above 0"),
        (["simulate", *PLACE, "--rate", "nan"], "--rate nan: must be"),
        ([*CHAT, "--tbt-slo-ms", "-1"], "--tbt-slo-ms -1.0: must be"),
        ([*CHAT, "--tbt-slo-ms", "1e9"], "--tbt-slo-ms 1000000000.0: must be"),
        ([*CHAT, "--requests", "1"], "--requests 1: must be a whole number of at least 2"),
        ([*CHAT, "--seeds", "0"], "--seeds 0: must be"),
        ([*CHAT, "--schedulers", "orka"], "unknown scheduler; did you mean 'orca'?"),
        ([*CHAT, "--schedulers", " , "], "--schedulers: names none; valid: sarathi, "),
        ([*CHAT, "--schedulers", "sarathi@99999999"], "takes at most 32768 tokens"),
        ([*CHAT, "--workload", "chatt"], "--workload 'chatt': unknown workload; did you mean 'chat'?"),
        ([*CHAT, "--arrivals", "gama"], "--arrivals 'gama': unknown; did you mean 'gamma'?"),
        ([*CHAT, "--set", "tbt_mod=pace"], "--set: unknown key 'tbt_mod'; did you mean 'tbt_mode'?"),
        ([*CHAT, "--set", "tbt_mode"], "--set 'tbt_mode': must be KEY=VALUE"),
        ([*CHAT, "--set", "tbt_mode=pacy"], "--tbt-mode 'pacy': unknown; did you mean 'pace'?"),
        ([*CHAT, "--set", "scheduler=orca"], "--set 'scheduler=orca': is set by --schedulers NAME here"),
        ([*CHAT, "--set", "token_budget=5"], "--set 'token_budget=5': is set by --schedulers NAME@N here"),
        ([*CHAT, "--noise", "5"], "--noise 5.0: must be a number from 0 to 1"),
        ([*CHAT, "--neighbour", "0.5"], "--neighbour 0.5: must be a number from 1 to 100"),
        ([*CHAT, "--too-long", "cut"], "--too-long 'cut': unknown"),
        ([*CHAT, "--trace", "nowhere.csv"], "--trace nowhere.csv: cannot be read"),
        ([*CHAT, "--trace-format", "azure"], "--trace-format: has no effect without --trace"),
        ([*CHAT, "--time-scale", "2"], "--time-scale: has no effect without --trace"),
        (["capacity", *PLACE, "--max-delay-s", "0"], "--max-delay-s 0.0: must be"),
        (["capacity", "--deployment", "mistral-7b/a1000"], "unknown device 'a1000'; did you mean 'a100'?"),
        (["capacity", "--deployment", "llama2-70b/a100"], "--deployment llama2-70b/a100: does not fit"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(
    nowhere: None, arguments: list[str], said: str
) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert re.sub(r"\s+", " ", done.output).startswith("error: ")
    assert said in re.sub(r"\s+", " ", done.output)


def test_requests_beyond_the_model_are_refused_or_counted(here: dict[str, Any], tmp_path: Path) -> None:
    # 4,096 tokens of context; the paper's own deployments serve its datasets with more.
    place = ["--deployment", "llama2-70b/a100:tp4", "--schedulers", "default", "--rate", 1, "--requests", 40]
    refused = invoke("simulate", *place)
    assert refused.exit_code == 1
    assert re.search(r"\d+ of 40 requests are longer than the model's 4096 tokens", refused.output)
    done = invoke("simulate", *place, "--too-long", "skip", "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert f"{40 - row['requests']} requests are longer than the model's context and left out" in done.output
    assert 0 < row["requests"] < 40


def test_fixed_budgets_and_baselines_take_no_slo() -> None:
    asked = simulated.Asked(
        "mistral-7b/a100", "chat", ("sarathi",), 50.0, 8, 1, settings=(("tbt_mode", "pace"),)
    )
    assert asked.scheduler_settings("sarathi") == (("tbt_slo_ms", 50.0), ("tbt_mode", "pace"))
    assert asked.scheduler_settings("sarathi@64") == (("tbt_mode", "pace"),)
    assert asked.scheduler_settings("orca") == asked.scheduler_settings("default@64") == ()


@pytest.mark.parametrize(("command", "requests"), [("simulate", 512), ("capacity", 512), ("fleet", 2048)])
def test_the_options_of_a_load_are_those_of_each_command(command: str, requests: int) -> None:
    options = {p.name: p for p in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert {field.name for field in fields(LoadOptions)} < options.keys()
    assert options["requests"].default == requests
    assert options["deployment"].required
    assert "load" not in options


def test_each_option_of_a_load_reaches_what_is_asked_for() -> None:
    given: dict[str, Any] = {
        "deployment": "mistral-7b/a100", "workload": "arxiv", "tbt_slo_ms": 61.0, "requests": 7, "arrivals": "fixed",
        "trace": Path("t.csv"), "trace_format": "azure", "too_long": "skip", "time_scale": 3.0,
        "calibration_dir": "elsewhere",
    }  # fmt: skip
    load = LoadOptions(**given, setting=["tbt_mode=pace"], noise=0.1, pauses=4.0, neighbour=2.0)
    asked = load.asked(("orca",), 5, max_delay_s=9.0)
    assert {key: getattr(asked, key) for key in given} == given
    assert (asked.schedulers, asked.seeds, asked.max_delay_s) == (("orca",), 5, 9.0)
    assert asked.settings == (("tbt_mode", "pace"),)
    assert asked.disturbance == Disturbance(0.1, 4.0, neighbour=2.0)


def test_a_capacity_of_a_burst_is_said_to_be_one() -> None:
    asked = simulated.Asked("llama-3.1-8b/h100", "chat", ("sarathi",), 100.0, requests=50, seeds=1)
    rows: list[dict[str, Any]] = [{"capacity_qps": None}, {"capacity_qps": 352.0}]
    assert "the 50 requests of a run come within 0.14 s" in simulated.burst_warning(rows, asked)
    assert not simulated.burst_warning(rows, replace(asked, requests=5000))
    assert not simulated.burst_warning(rows[:1], asked)
