"""`make bench-compare`: what `make bench` writes has figures in common with the baseline of the same file name.

Each command of `make bench` is parsed as the command line does it, and its rows are made by its own row builder, with
made-up figures. A row that differs from the baseline's in a setting, such as how many requests are sent, has none in
common.
"""

import json
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from autolrs_plugin.benchmark import parallel
from autolrs_plugin.benchmark.runner import METHODS
from autolrs_plugin.benchmark.table import Run
from autolrs_plugin.benchmark.table import rows as autolrs_rows
from autolrs_plugin.cli import app as autolrs
from tests.test_house import ROOT
from vllm_sarathi.benchmark.capacity.search import Found
from vllm_sarathi.benchmark.common.compare import Key, figures_of, read_figures
from vllm_sarathi.benchmark.live.rows import build_row
from vllm_sarathi.benchmark.live.run import Options, parse_options, plan_sessions
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord
from vllm_sarathi.benchmark.paper import runs as paper
from vllm_sarathi.benchmark.profile import overhead, speed
from vllm_sarathi.benchmark.profile.overhead import Overhead
from vllm_sarathi.benchmark.profile.simulator import metric_rows
from vllm_sarathi.cli import app as vllm_sarathi
from vllm_sarathi.cli.live import LiveOptions
from vllm_sarathi.cli.overhead import overhead as overhead_command
from vllm_sarathi.simulation.outcome import outcome_of

Rows = list[dict[str, Any]]
COMMANDS = {"vllm-sarathi": vllm_sarathi, "autolrs": autolrs}

CANNOT_MATCH = {
    "autolrs": "the baseline is of the judging tasks, and make bench runs three of the design tasks",
}
"""Baselines that have nothing in common with what `make bench` writes, and why."""


def bench_commands() -> dict[str, list[str]]:
    """Return the commands of `make bench` that write rows, as words, by the name of their file."""
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    commands = {}
    for line in recipe[1].replace("\\\n", " ").replace("$(MODEL)", "owner/name").splitlines():
        if written := re.search(r"\.venv/bin/(.*)--json \"\$\(BENCH\)/(.+)\.json\"", line):
            commands[written[2]] = [*shlex.split(written[1]), "--json", "rows.json"]
    return commands


def asked(words: list[str]) -> dict[str, Any]:
    """Return the options of a command line of ours, defaults included."""
    command: Any = typer.main.get_command(COMMANDS[words[0]])
    at = 1
    while hasattr(command, "commands"):
        command, at = command.commands[words[at]], at + 1
    params: dict[str, Any] = command.make_context(words[at - 1], words[at:]).params
    return params


def overhead_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    """The command is run: its row is made where it is written."""
    patch.setattr(
        overhead, "measure_overhead", lambda _, running, waiting: Overhead(running, waiting, 100.0, 10.0, 0.1)
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        overhead_command(**{**given, "json": rows})
        return list(json.loads(rows.read_text())["rows"])


STREAM = [Delivery(0.1, 1), Delivery(0.2, 1)]


def live_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    options: Options = parse_options(**{name: given[name] for name in LiveOptions.__dataclass_fields__})
    rows = []
    for session in plan_sessions(options):
        slos_ms = options.tbt_slos_ms if session.tbt_slo_ms is None else (session.tbt_slo_ms,)
        for name in session.workloads:
            count = options.workload(name).requests
            records = [StreamRecord(str(i), 0.0, tuple(STREAM), "", 8, 2) for i in range(count)]
            rows += [build_row(name, slo_ms, session.contender, records) for slo_ms in slos_ms]
    return rows


def simulator_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    for name in ("steps_per_s", "chat_s", "query_us"):
        patch.setattr(speed, name, lambda *_, **__: 1.0)
    return [*speed.measure_speed(), *speed.measure_queries()]


FIGURES = {"gap_ms": {"p50": 1.0, "p99": 1.0}, "ttft_ms": {"mean": 1.0, "p50": 1.0, "p90": 1.0}}


def validate_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    runs = [{**FIGURES, "output_tokens_per_s": 1.0}]
    return [row for name in given["schedulers"].split(",") for row in metric_rows(name, runs, runs)]


def paper_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    patch.setattr(paper, "find", lambda _: Found(1.0, FIGURES))
    patch.setattr(paper, "simulate_task", lambda *_, **__: outcome_of([]))
    return [paper.measure(cell) for cell in paper.cells_of(paper.QUICK if given["quick"] else paper.FULL)]


def autolrs_bench_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    methods = given["methods"].split(",") if given["methods"] else METHODS
    return autolrs_rows(
        [
            Run(task, method, seed, 1e-3, 1.0, 200, 20, 3.0, [], {}, first_val_loss=2.0)
            for task in given["task"].split(",")
            for method in methods
            for seed in range(given["seeds"])
        ]
    )


def parallel_rows(given: dict[str, Any], patch: pytest.MonkeyPatch) -> Rows:
    about = {"task": given["task"], "steps": given["steps"]}
    pair = {"sequential_s": 2.0, "parallel_s": 1.0, "ratio": 0.5}
    measured = {**about, "actors": given["actors"], "repeats": [pair], "ratio": 0.5, "same_decisions": True}
    return parallel.rows_of(measured, {**about, "send_s": 0.1, "rows": [{"workers": 1, "ratio": 1.0}]})


BUILDERS: dict[str, Callable[[dict[str, Any], pytest.MonkeyPatch], Rows]] = {
    "overhead": overhead_rows,
    "live": live_rows,
    "simulator": simulator_rows,
    "validate": validate_rows,
    "paper": paper_rows,
    "autolrs": autolrs_bench_rows,
    "parallel": parallel_rows,
}


def in_common(name: str, words: list[str], patch: pytest.MonkeyPatch) -> int:
    """Return how many figures of a command's rows are in the baseline of their name."""
    return len(set(read_figures(ROOT / f"bench/baselines/{name}.json")) & written_by(name, words, patch))


def written_by(name: str, words: list[str], patch: pytest.MonkeyPatch) -> set[Key]:
    """Return the figures that a command writes."""
    written = {key for key, _ in figures_of("", BUILDERS[name](asked(words), patch))}
    assert written, f"{name}: the builder has made no figure"
    return written


def test_each_baseline_of_make_bench_is_looked_at() -> None:
    with_baseline = {name for name in bench_commands() if (ROOT / f"bench/baselines/{name}.json").exists()}
    assert with_baseline == set(BUILDERS)
    assert set(BUILDERS) >= set(CANNOT_MATCH)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_rows_of_make_bench_are_those_of_the_baseline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = in_common(name, bench_commands()[name], monkeypatch)
    if name in CANNOT_MATCH:
        assert not found, f"{name}: has {found} figures in common now; take it out of CANNOT_MATCH"
    else:
        assert found, f"{name}: make bench writes no figure of bench/baselines/{name}.json"


def test_a_setting_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full benchmark and the shortened one differ in how many requests they send."""
    words = ["vllm-sarathi", "bench", "live", "--model", "owner/name", "--workload", "mix"]
    assert not written_by("live", words, monkeypatch) & written_by("live", [*words, "--quick"], monkeypatch)
