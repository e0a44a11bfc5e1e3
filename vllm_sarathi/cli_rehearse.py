"""The commands that need no device: `simulate` and `capacity`."""

import functools
import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

DeploymentOption = Annotated[
    str,
    typer.Option(help="MODEL/DEVICE, as mistral-7b/a100 or llama2-70b/a40:tp4pp2; MODEL may be a folder."),
]
WorkloadOption = Annotated[
    str, typer.Option(help="chat, arxiv, uniform, zipf, mix, or classes (three promises).")
]
SchedulersOption = Annotated[
    str, typer.Option(help="Names with commas between; NAME@N has a fixed budget of N.")
]
SloOption = Annotated[float | None, typer.Option("--tbt-slo-ms", help="Promised time between tokens.")]
RequestsOption = Annotated[int, typer.Option(help="Requests in a run.")]
SeedsOption = Annotated[int, typer.Option(help="Runs with different requests, for the range of the answer.")]
ArrivalsOption = Annotated[str, typer.Option(help="poisson, gamma (bursty) or fixed.")]
TraceOption = Annotated[
    Path | None, typer.Option(help="A file of arrivals and lengths instead of --workload.")
]
FormatOption = Annotated[str, typer.Option(help="azure, mooncake or csv.")]
TooLongOption = Annotated[str, typer.Option(help="Requests beyond the model's context: refuse, or skip.")]
ScaleOption = Annotated[float, typer.Option(help="Play a trace so many times as fast.")]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of SarathiConfig, for sarathi; may be repeated.")
]
RayOption = Annotated[
    str | None, typer.Option(help="Run on a Ray cluster: its address, or 'local' to start one.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")]
DEFAULT_SCHEDULERS = "sarathi,default,prefill-first,orca"


def write_rows(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Write rows to a file as JSON, if one is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_format.dumps(list(rows), indent=2) + "\n", encoding="utf-8")


def read_settings(texts: Sequence[str] | None) -> tuple[tuple[str, Any], ...]:
    """Return KEY=VALUE texts as settings.

    Raises:
        ConfigError: a text without `=`, or an unknown key.
    """
    from vllm_sarathi.core.config import ConfigError, check_keys

    settings: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r}: must be KEY=VALUE, as in --set tbt_mode=pace.")
        try:
            settings[key] = json_format.loads(value)
        except ValueError:
            settings[key] = value
    check_keys(settings, "--set")
    return tuple(settings.items())


def simulate(
    deployment: DeploymentOption,
    rate: Annotated[float | None, typer.Option(help="Requests per second; a trace has its own.")] = None,
    workload: WorkloadOption = "chat",
    schedulers: SchedulersOption = DEFAULT_SCHEDULERS,
    tbt_slo_ms: SloOption = 100.0,
    requests: RequestsOption = 512,
    seeds: SeedsOption = 1,
    arrivals: ArrivalsOption = "poisson",
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    setting: SettingOption = None,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Rehearse one load on a deployment, and print what each scheduler makes of it."""
    from vllm_sarathi.benchmark import farm, rehearsal
    from vllm_sarathi.core.config import ConfigError, check_positive

    if rate is None and trace is None:
        raise ConfigError("--rate: how many requests per second? (A --trace has a rate of its own.)")
    if rate is not None:
        check_positive("rate", rate, 1e6)
    asked = rehearsal.Asked(
        deployment=deployment,
        workload=workload,
        schedulers=tuple(schedulers.split(",")),
        tbt_slo_ms=tbt_slo_ms,
        requests=requests,
        seeds=seeds,
        arrivals=arrivals,
        trace=trace,
        trace_format=trace_format,
        too_long=too_long,
        time_scale=time_scale,
        settings=read_settings(setting),
    )
    rehearsal.check_asked(asked)
    console = Console()
    rows = rehearsal.simulate_rows(asked, rate, functools.partial(farm.run_all, console=console, ray=ray))
    console.print(rehearsal.simulate_table(rows))
    write_rows(rows, json)


def capacity(
    deployment: DeploymentOption,
    workload: WorkloadOption = "chat",
    schedulers: SchedulersOption = DEFAULT_SCHEDULERS,
    tbt_slo_ms: SloOption = 100.0,
    max_delay_s: Annotated[float, typer.Option(help="The longest median scheduling delay, seconds.")] = 2.0,
    requests: RequestsOption = 512,
    seeds: SeedsOption = 3,
    arrivals: ArrivalsOption = "poisson",
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    setting: SettingOption = None,
    ray: RayOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the answer in this file (PNG).")] = None,
    json: JsonOption = None,
) -> None:
    """Find the highest rate that each scheduler carries within the promise."""
    from vllm_sarathi.benchmark import farm, rehearsal

    asked = rehearsal.Asked(
        deployment=deployment,
        workload=workload,
        schedulers=tuple(schedulers.split(",")),
        tbt_slo_ms=tbt_slo_ms,
        requests=requests,
        seeds=seeds,
        arrivals=arrivals,
        max_delay_s=max_delay_s,
        trace=trace,
        trace_format=trace_format,
        too_long=too_long,
        time_scale=time_scale,
        settings=read_settings(setting),
    )
    rehearsal.check_asked(asked)
    console = Console()
    carried, skipped = rehearsal.workload_of(asked)
    if skipped:
        console.print(f"{skipped} requests of the trace are too long for the model and left out")
    tasks = rehearsal.tasks_of(asked, carried)
    rows = rehearsal.capacity_rows(tasks, functools.partial(farm.run_all, console=console, ray=ray))
    console.print(rehearsal.capacity_table(rows))
    if plot is not None:
        rehearsal.capacity_plot(rows, plot)
    write_rows(rows, json)
