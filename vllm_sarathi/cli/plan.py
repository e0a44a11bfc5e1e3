"""`vllm-sarathi plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_sarathi.cli.fleet import TtftOption
from vllm_sarathi.cli.options import (
    ArrivalsOption,
    FormatOption,
    JsonOption,
    RateOption,
    RayOption,
    ScaleOption,
    SchedulersOption,
    SloOption,
    TooLongOption,
    TraceOption,
    WorkloadOption,
    can_be_written,
    read_names,
    say_skipped,
)

ModelOption = Annotated[str, typer.Option(help="OWNER/MODEL, a short name, or a folder with a config.json.")]
PricesOption = Annotated[Path, typer.Option(help="What each device costs per hour: a YAML or JSON file.")]
ClassesOption = Annotated[Path | None, typer.Option(help="SLOs by class instead, as in `vllm serve`.")]
AttainmentOption = Annotated[
    float, typer.Option(help="The share of each class's requests that must meet their SLOs.")
]
DevicesOption = Annotated[
    str | None, typer.Option(help="Comma-separated names; default: all that have a price.")
]
MostOption = Annotated[int, typer.Option(help="The most devices of one replica.")]
PrecisionsOption = Annotated[
    str, typer.Option(help="Precisions of the weights, comma-separated: checkpoint, fp8, nvfp4.")
]
SkewOption = Annotated[
    float | None,
    typer.Option(help="Exponent of the power law that the experts' loads follow; 0 for even ones."),
]
ReplicaRequestsOption = Annotated[
    int, typer.Option(help="Requests in a run; more if they last less than 30 s.")
]
ExhaustiveOption = Annotated[bool, typer.Option("--exhaustive", help="Search every candidate to its end.")]
RayServeOption = Annotated[
    Path | None,
    typer.Option(
        help="Write a file for `serve run` of Ray Serve that deploys the choice.", callback=can_be_written
    ),
]


def plan(
    model: ModelOption,
    prices: PricesOption,
    rate: RateOption = None,
    workload: WorkloadOption = "chat",
    tbt_slo_ms: SloOption = None,
    ttft_slo_ms: TtftOption = None,
    slo_classes: ClassesOption = None,
    attainment: AttainmentOption = 0.95,
    devices: DevicesOption = None,
    most_devices: MostOption = 8,
    schedulers: SchedulersOption = "sarathi,default@512,default@2048",
    precisions: PrecisionsOption = "checkpoint",
    skew: SkewOption = None,
    requests: ReplicaRequestsOption = 300,
    arrivals: ArrivalsOption = "poisson",
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    exhaustive: ExhaustiveOption = False,
    ray_serve: RayServeOption = None,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Find the cheapest deployment that meets the SLOs at a rate, and how to start it."""
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.benchmark.plan import report
    from vllm_sarathi.benchmark.plan import search as benchmark
    from vllm_sarathi.benchmark.plan.load import LoadAsked, load_of
    from vllm_sarathi.benchmark.plan.prices import read_prices
    from vllm_sarathi.core.config import ConfigError, check_int
    from vllm_sarathi.simulation.model_limits import max_tokens_of

    check_int("most_devices", most_devices, minimum=1)
    asked = LoadAsked(
        workload, requests, arrivals, trace, trace_format, time_scale, too_long, rate, tbt_slo_ms, ttft_slo_ms,
        slo_classes, attainment,
    )  # fmt: skip
    listed, names = read_prices(prices), read_names(schedulers)
    weights = benchmark.read_precisions(read_names(precisions))
    experts = benchmark.has_experts(model, weights)
    load = load_of(asked, max_tokens_of(model))
    benchmark.check_candidates(names, load)
    cost = listed.of(None if devices is None else read_names(devices))
    candidates = benchmark.candidates_of(model, cost, names, most_devices, weights, experts, skew)
    console = Console()
    console.print(f"{len(candidates)} candidates, at the prices of {prices}", soft_wrap=True)
    say_skipped(load.skipped, console)
    with farm.open_workers(len(candidates), ray) as workers:
        board = _search(candidates, load, cost, workers, exhaustive, console)
    found = report.choose(board, load)
    rows = report.rows_of(board, load, listed, found)
    console.print(report.plan_table(rows, listed.currency))
    if not found:
        results.write_rows(rows, json, margin=None)
        raise ConfigError(report.unheld_said(board))
    lines = [*report.source_lines(board), *report.lines_of(found, load, listed.currency, slo_classes)]
    if ray_serve is not None:
        report.write_ray_serve(found[0].verdict.candidate, load, found[0].replicas, ray_serve)
        lines.append(f"or all of them with: serve run {ray_serve}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    results.write_rows(rows, json, margin=report.margin(found))


def _search(candidates: Any, load: Any, cost: Any, workers: Any, exhaustive: bool, console: Console) -> Any:
    from rich.progress import Progress

    from vllm_sarathi.benchmark.plan import search as benchmark

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("searching", total=len(candidates))
        return benchmark.search(
            candidates, load, cost, workers, not exhaustive, lambda verdict: progress.advance(bar)
        )
