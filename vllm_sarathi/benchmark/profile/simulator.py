"""`vllm-sarathi validate`: the same requests in simulation and on a real server, figure by figure.

First the device is calibrated as it serves: a server of ours with a fixed budget writes a step trace while
`vllm bench serve` sends it requests of other lengths, at other times, from another seed than those that are compared.
From it come the mean time of each shape of a step, how steps scatter around it, and how long a request spends outside
the engine (the client, HTTP, the tokenizer, the queues between processes). Then each scheduler serves the workload
for real, and the simulator is told nothing of how that went.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_sarathi.benchmark.capacity.search import RequestSource, check_requests
from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live.arrivals import Arrival, draw_arrivals
from vllm_sarathi.benchmark.live.load import Load, read_result, send, write_load
from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.server import (
    KV_CACHE_GIB,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    SERVER_FLAGS,
    serve,
    server_env,
)
from vllm_sarathi.benchmark.live.streams import StreamRecord
from vllm_sarathi.benchmark.profile.trace import read_step_trace
from vllm_sarathi.core.config import (
    BASELINES,
    NO_CALIBRATION,
    STOCK_SCHEDULER,
    SarathiConfig,
    check_int,
    check_positive,
    flag_name,
)
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.simulation.calibrated import Ratios, StepFit, fit_steps
from vllm_sarathi.simulation.deployment import (
    SchedulerChoice,
    build,
    check_some,
    cpu_deployment,
    scheduler_choice,
)
from vllm_sarathi.simulation.models import model_shape
from vllm_sarathi.simulation.outcome import outcome_of
from vllm_sarathi.simulation.placement import Deployment
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.traces import check_no_trace, read_trace
from vllm_sarathi.simulation.workloads.live import Kind, LiveWorkload
from vllm_sarathi.simulation.workloads.registry import live_named
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest, at_rate

VALIDATION = LiveWorkload(
    "validation",
    "short and medium prompts",
    (Kind(0.7, (40, 200), (40, 80)), Kind(0.3, (200, 600), (40, 80))),
    requests=60,
    rate_per_s=1.0,
)
"""What is compared, unless another workload is named: prompts are read while streams run, and queues stay short."""

CALIBRATION = LiveWorkload(
    "calibration",
    "prompts of all lengths",
    (Kind(0.5, (16, 200), (24, 72)), Kind(0.35, (200, 700), (24, 72)), Kind(0.15, (700, 1800), (24, 72))),
    requests=48,
    rate_per_s=0.9,
)
CALIBRATION_SEED = 1_000_003
LONE_REQUESTS = 12
LONE_GAP_S = 1.0
"""Requests that are sent one by one before the calibration's load, to measure the time outside the engine."""

STEP_TOKENS = 2048
"""vLLM's default for a server on a CPU; the same for all, so that what is called idle is the same."""

BUSY_SHARE = 0.5
"""Of the cores: a load above it before anything has started is somebody else's."""

REPLICAS = 5
"""Simulations of each load, with other draws of the scatter; figures are their means."""

METRICS = (
    ("gap_p50_ms", "gap_ms", "p50"),
    ("gap_p99_ms", "gap_ms", "p99"),
    ("ttft_mean_ms", "ttft_ms", "mean"),
    ("ttft_p90_ms", "ttft_ms", "p90"),
    ("output_tokens_per_s", "output_tokens_per_s", None),
)


@dataclass(frozen=True)
class Calibration:
    """What was measured of a server.

    Attributes:
        model: how long its steps take.
        ratios: how they scatter.
        outside_s: what a request spends outside the engine until its first token is there, seconds.
    """

    model: StepFit
    ratios: Ratios
    outside_s: float


@dataclass(frozen=True)
class Comparison:
    """What is compared: who schedules, and under which loads."""

    choices: tuple[SchedulerChoice, ...]
    loads: tuple[Load, ...]


def parse_comparison(
    *,
    model: str,
    workload: str,
    schedulers: Sequence[str],
    tbt_slo_ms: float | None,
    requests: int | None,
    rate_qps: float | None,
    seeds: int,
    trace: Path | None,
    trace_format: str,
    too_long: str,
    time_scale: float,
    out: Path,
) -> Comparison:
    """Check what the user asked for and write the loads down, before any server starts.

    Raises:
        ConfigError: an unknown name, a value out of range, or a trace that cannot be used.
    """
    model_shape(model)
    check_int("seeds", seeds, minimum=1)
    if requests is not None:
        check_requests(requests, least=2)
    if rate_qps is not None:
        check_positive("rate", rate_qps, 1e6)
    check_some(schedulers)
    choices = tuple(
        scheduler_choice(
            name, **({} if tbt_slo_ms is None or name in BASELINES else {"tbt_slo_ms": tbt_slo_ms})
        )
        for name in schedulers
    )
    if trace is not None:
        name = trace.stem
        read = read_trace(trace, trace_format, MAX_MODEL_LEN, too_long, time_scale).requests
        drawn = [RequestSource(name, requests or len(read), trace=read).window(seed) for seed in range(seeds)]
        played = [window if rate_qps is None else at_rate(window, rate_qps) for window in drawn]
        streams = [
            [Arrival(r.arrival_s - window[0].arrival_s, r.prompt_tokens, r.output_tokens) for r in window]
            for window in played
        ]
    else:
        check_no_trace(trace_format, time_scale)
        name = workload
        known = VALIDATION if workload == VALIDATION.name else live_named(workload, (VALIDATION.name,))
        wanted = replace(known, requests=requests or known.requests, rate_per_s=rate_qps or known.rate_per_s)
        streams = [draw_arrivals(wanted, seed) for seed in range(seeds)]
    loads = [write_load(f"{name}-{seed}", each, model, out, seed) for seed, each in enumerate(streams)]
    return Comparison(choices, tuple(loads))


def server_flags(choice: SchedulerChoice) -> list[str]:
    """Return the flags of `vllm serve` that make it schedule so, with no memory of earlier runs."""
    if choice.config is None:
        return [
            "--scheduler",
            STOCK_SCHEDULER,
            "--max-num-batched-tokens",
            str(choice.step_tokens or STEP_TOKENS),
        ]
    flags = ["--scheduler", choice.config.scheduler, "--max-num-batched-tokens", str(STEP_TOKENS)]
    settings = replace(choice.config, calibration_dir=NO_CALIBRATION).to_mapping()
    for key, default in SarathiConfig().to_mapping().items():
        if settings[key] != default and key != "scheduler":
            flags += [flag_name(key), *([] if settings[key] is True else [str(settings[key])])]
    return flags


def calibration_arrivals() -> list[Arrival]:
    """Return the calibration's requests: those that come one by one, then the load."""
    load = draw_arrivals(CALIBRATION, CALIBRATION_SEED)
    lone = [Arrival(i * LONE_GAP_S, 16 + 16 * i, 2) for i in range(LONE_REQUESTS)]
    return lone + [replace(a, at_s=round(a.at_s + LONE_REQUESTS * LONE_GAP_S, 3)) for a in load]


def calibration_of(steps: Sequence[TracedStep], records: Sequence[StreamRecord]) -> Calibration:
    """Return what a step trace and the clients' records of the calibration say.

    Raises:
        RuntimeError: requests failed, or the steps are too few.
    """
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests of the calibration failed; the first: {failed[0]}")
    alone = [step.measured_s for step in steps if step.shape.decodes == 0][:LONE_REQUESTS]
    ways_s = [
        record.ttft_s - step_s
        for record, step_s in zip(records, alone, strict=False)
        if record.ttft_s is not None
    ]
    model, ratios = fit_steps(steps)
    return Calibration(model, ratios, max(0.0, statistics.median(ways_s)))


def simulated(
    place: Deployment, choice: SchedulerChoice, arrivals: Sequence[Arrival], outside_s: float, seed: int
) -> dict[str, Any]:
    """Return the figures of a simulated run, as a client would measure them."""
    requests = [SimulatedRequest(a.at_s + outside_s, a.prompt_tokens, a.output_tokens) for a in arrivals]
    scheduler = build(place, replace(choice, step_tokens=choice.step_tokens or STEP_TOKENS))
    simulator = Simulator(scheduler, place.times(seed), requests, place.in_flight)
    simulator.run()
    for log, arrival in zip(simulator.logs, arrivals, strict=True):
        log.request = replace(log.request, arrival_s=arrival.at_s)
    return outcome_of(simulator.logs).to_mapping()


def metric_rows(
    scheduler: str, simulations: Sequence[Mapping[str, Any]], lives: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each metric, of the means over runs; the error is relative to the live one."""

    def mean(runs: Sequence[Mapping[str, Any]], group: str, key: str | None) -> float:
        return statistics.fmean(run[group] if key is None else run[group][key] for run in runs)

    rows = []
    for name, group, key in METRICS:
        sim, live = mean(simulations, group, key), mean(lives, group, key)
        rows.append(
            {
                "scheduler": scheduler,
                "metric": name,
                "simulated": sim,
                "live": live,
                "relative_error": abs(sim - live) / live,
            }
        )
    return rows


def validate(
    choices: Sequence[SchedulerChoice],
    loads: Sequence[Load],
    out: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Calibrate, serve each load with each scheduler, simulate the same, and return the rows.

    Raises:
        ServerError: a server did not come up, or died.
        RuntimeError: a client failed, or requests did.
    """
    model = loads[0].model
    _warn_of_other_work(console)
    with Stages(console) as stages:
        calibration = _calibrate(model, out, stages)
        lives = {choice.text: _serve(choice, loads, out, stages) for choice in choices}
    console.print(f"a request spends {calibration.outside_s * 1e3:.0f} ms outside the engine")
    place = replace(
        cpu_deployment(model, calibration.model, calibration.ratios, KV_CACHE_GIB),
        max_tokens=MAX_MODEL_LEN,
        max_sequences=MAX_NUM_SEQS,
        step_tokens=STEP_TOKENS,
    )
    rows = []
    for choice in choices:
        simulations = [
            simulated(place, choice, load.arrivals, calibration.outside_s, seed)
            for load in loads
            for seed in range(REPLICAS)
        ]
        rows += metric_rows(choice.text, simulations, lives[choice.text])
    return rows


def _warn_of_other_work(console: Console) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_SHARE * cores:
        console.print(
            f"other work runs on this machine (load {load:.1f} on {cores} cores): the calibration and the live runs "
            "may see different speeds, which adds to the errors below"
        )


def _calibrate(model: str, out: Path, stages: Stages) -> Calibration:
    load = write_load(CALIBRATION.name, calibration_arrivals(), model, out, CALIBRATION_SEED)
    trace = out / "calibration.steps.jsonl"
    trace.unlink(missing_ok=True)
    flags = ["--scheduler", "sarathi", "--token-budget", str(STEP_TOKENS), "--step-trace", str(trace)]
    result = out / "calibration.json"
    _serve_loads(
        "calibration", [*flags, "--max-num-batched-tokens", str(STEP_TOKENS)], {result: load}, stages
    )
    return calibration_of(read_step_trace(trace), read_result(result, load))


def _serve(choice: SchedulerChoice, loads: Sequence[Load], out: Path, stages: Stages) -> list[dict[str, Any]]:
    """Return the figures of each load on a server with this scheduler."""
    results = {out / f"{load.name}-{choice.text}.json": load for load in loads}
    _serve_loads(choice.text, server_flags(choice), results, stages)
    figures = []
    for result, load in results.items():
        records = read_result(result, load)
        failed = [record.error for record in records if record.error is not None]
        if failed:
            raise RuntimeError(f"{choice.text}: {len(failed)} requests failed; the first: {failed[0]}")
        figures.append(summarise_streams(records))
    return figures


def _serve_loads(name: str, flags: Sequence[str], results: Mapping[Path, Load], stages: Stages) -> None:
    """Send loads to one server, one after the other, each into its result."""
    model = next(iter(results.values())).model
    env = server_env(model)
    stages.begin(f"{name}: starting the server")
    log_path = next(iter(results)).with_suffix(".server.log")
    with serve(model, [*SERVER_FLAGS, *flags], log_path=log_path, env=env) as server:
        for result, load in results.items():
            stages.begin(f"{name}: {load.name}, {len(load.arrivals)} requests", total=load.duration_s)
            send(load, server.base_url, result, env=env, metadata={}, while_running=stages.advance)


def errors_of(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the median and the largest relative error."""
    errors = [row["relative_error"] for row in rows]
    return statistics.median(errors), max(errors)


def validate_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as a table."""
    middle, worst = errors_of(rows)
    table = Table(title=f"simulated against live: median error {middle:.1%}, worst {worst:.1%}")
    for name in ("scheduler", "metric", "simulated", "live", "error"):
        table.add_column(name, justify="left" if name in ("scheduler", "metric") else "right")
    for row in rows:
        figures = [f"{row[key]:,.1f}" for key in ("simulated", "live")]
        table.add_row(row["scheduler"], row["metric"], *figures, f"{row['relative_error']:.1%}")
    return table
