"""The commands that need no device: `simulate` and `capacity`."""

import functools
import json as json_format
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

RAY_LOCAL = "local"
"""What `--ray` takes to start a Ray of its own, and what it means without an address."""


class RayCommand(TyperCommand):
    """A command whose `--ray` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line."""
        whole: list[str] = []
        for word, following in zip(args, [*args[1:], "-"], strict=False):
            whole.append(word)
            if word == "--ray" and following.startswith("-"):
                whole.append(RAY_LOCAL)
        return super().parse_args(ctx, whole)


DeploymentOption = Annotated[
    str,
    typer.Option(
        help="MODEL/DEVICE, as mistral-7b/a100, Qwen/Qwen3-32B/h100:tp4 (measured kernels, with the extra devices) or "
        "meta-llama/Llama-3.1-70B/h100:fp8tp4; MODEL may be a folder."
    ),
]
WorkloadOption = Annotated[
    str,
    typer.Option(
        help="chat, arxiv, uniform, zipf, mix, classes (three promises), or mooncake (shared prefixes)."
    ),
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
FormatOption = Annotated[
    str,
    typer.Option(help="azure, mooncake, or csv: arrival_s, prompt_tokens, output_tokens (or JSON lines)."),
]
TooLongOption = Annotated[str, typer.Option(help="Requests beyond the model's context: refuse, or skip.")]
ScaleOption = Annotated[
    float, typer.Option(help="Play a trace so many times as fast (where no other rate is asked for).")
]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of SarathiConfig, for sarathi; may be repeated.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]", help="Run on a Ray cluster; without an address, on one that is started here."
    ),
]
CalibrationOption = Annotated[
    str | None, typer.Option(help="For MODEL/cpu: the folder that `vllm-sarathi profile` filled.")
]
NoiseOption = Annotated[float, typer.Option(help="Noise of every step's time, as a share: 0.05 is 5%.")]
PausesOption = Annotated[float, typer.Option(help="Pauses of 20 to 200 ms a minute.")]
NeighbourOption = Annotated[
    float, typer.Option(help="Steps take so many times as long while a neighbour is there, 5 s of every 10.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")]
DEFAULT_SCHEDULERS = "sarathi,default,prefill-first,orca"


ELSEWHERE = {
    "scheduler": "--schedulers NAME",
    "token_budget": "--schedulers NAME@N",
    "tbt_slo_ms": "--tbt-slo-ms MS",
}
"""Settings that have an option of their own here."""


def read_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas; each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


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
        if key in ELSEWHERE:
            raise ConfigError(f"--set {text!r}: is said by {ELSEWHERE[key]} here.")
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
    calibration_dir: CalibrationOption = None,
    noise: NoiseOption = 0.0,
    pauses: PausesOption = 0.0,
    neighbour: NeighbourOption = 1.0,
    save_trace: Annotated[
        Path | None,
        typer.Option(help="Write the requests of the first seed to this file, in Mooncake's format."),
    ] = None,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Rehearse one load on a deployment, and print what each scheduler makes of it."""
    from vllm_sarathi.benchmark.capacity import simulated as rehearsal
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.core.config import ConfigError, check_positive
    from vllm_sarathi.simulation.devices.disturbed import Disturbance
    from vllm_sarathi.simulation.traces import write_trace

    if rate is None and trace is None:
        raise ConfigError("--rate: how many requests per second? (A --trace has a rate of its own.)")
    if rate is not None:
        check_positive("rate", rate, 1e6)
    asked = rehearsal.Asked(
        deployment=deployment,
        workload=workload,
        schedulers=read_names(schedulers),
        tbt_slo_ms=tbt_slo_ms,
        requests=requests,
        seeds=seeds,
        arrivals=arrivals,
        trace=trace,
        trace_format=trace_format,
        too_long=too_long,
        time_scale=time_scale,
        settings=read_settings(setting),
        calibration_dir=calibration_dir,
        disturbance=Disturbance(noise, pauses, neighbour=neighbour),
    )
    rehearsal.check_asked(asked)
    console = Console()
    carried = announced_workload(asked, console)
    if save_trace is not None:
        write_trace(carried.at(rate, 0) if rate else carried.window(0), save_trace)
    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = rehearsal.simulate_rows(asked, carried, rate, run_all)
    console.print(rehearsal.simulate_table(rows))
    results.write_rows(rows, json)


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
    calibration_dir: CalibrationOption = None,
    noise: NoiseOption = 0.0,
    pauses: PausesOption = 0.0,
    neighbour: NeighbourOption = 1.0,
    ray: RayOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the answer in this file (PNG).")] = None,
    json: JsonOption = None,
) -> None:
    """Find the highest rate that each scheduler carries within the promise."""
    from vllm_sarathi.benchmark.capacity import simulated as rehearsal
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.simulation.devices.disturbed import Disturbance

    asked = rehearsal.Asked(
        deployment=deployment,
        workload=workload,
        schedulers=read_names(schedulers),
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
        calibration_dir=calibration_dir,
        disturbance=Disturbance(noise, pauses, neighbour=neighbour),
    )
    rehearsal.check_asked(asked)
    console = Console()
    tasks = rehearsal.tasks_of(asked, announced_workload(asked, console))
    rows = rehearsal.capacity_rows(tasks, functools.partial(farm.run_all, console=console, ray=ray))
    console.print(rehearsal.capacity_table(rows))
    if plot is not None:
        rehearsal.capacity_plot(rows, plot)
    results.write_rows(rows, json)


def announced_workload(asked: Any, console: Console) -> Any:
    """Return the workload of `rehearsal.Asked`, and print where its step times come from and what it leaves out."""
    from vllm_sarathi.benchmark.capacity.simulated import workload_of

    carried, skipped = workload_of(asked)
    for line in asked.place.source.lines:
        console.print(line, soft_wrap=True)
    if skipped:
        console.print(f"{skipped} requests are longer than the model's context and left out")
    return carried


def validate(
    model: Annotated[str, typer.Option(help="A folder with a model.")] = "build/models/SmolLM2-135M-Instruct",
    workload: Annotated[str, typer.Option(help="validation, chat, long, mix, rush or burst.")] = "validation",
    schedulers: SchedulersOption = "default,sarathi",
    tbt_slo_ms: SloOption = 250.0,
    requests: Annotated[
        int | None, typer.Option(help="Requests in a run; the workload's own number.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second; the workload's own rate.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs with different requests; figures are their means.")] = 1,
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    out: Annotated[Path, typer.Option(help="Where raw results and logs go.")] = Path("build/validate"),
    silicon: Annotated[
        bool,
        typer.Option(
            "--silicon", help="Against measured accelerators instead: the sample of aiconfigurator-core."
        ),
    ] = False,
    ids: Annotated[
        Path | None, typer.Option(help="With --silicon: a file with the ids of the rows to simulate.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="With --silicon: all odd rows, not a few of each group.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Compare the rehearsal with the show: the same load simulated, and on a real server on this CPU.

    With --silicon, against the measured TTFT and TPOT of servers on accelerators. Constants were fitted on the rows
    with even ids; the table is of odd ones: four of each group, or --all.
    """
    from vllm_sarathi.benchmark.common import results
    from vllm_sarathi.benchmark.profile import simulator as room
    from vllm_sarathi.core.config import ConfigError

    if silicon:
        _validate_silicon(ids, every, json)
        return
    for option, given in (("--ids", ids is not None), ("--all", every)):
        if given:
            raise ConfigError(f"{option}: says which rows of --silicon, which is not asked for.")
    asked = room.parse_asked(
        model=model,
        workload=workload,
        schedulers=read_names(schedulers),
        tbt_slo_ms=tbt_slo_ms,
        requests=requests,
        rate_qps=rate,
        seeds=seeds,
        trace=trace,
        trace_format=trace_format,
        too_long=too_long,
        time_scale=time_scale,
        out=out,
    )
    console = Console()
    rows = room.validate(asked.choices, asked.loads, out, console)
    console.print(room.validate_table(rows))
    results.write_rows(rows, json)


def _validate_silicon(ids: Path | None, every: bool, json: Path | None) -> None:
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.benchmark.profile import silicon as room
    from vllm_sarathi.benchmark.profile import silicon_sample

    console = Console()
    sample = silicon_sample.read_sample()
    rows = room.asked_rows(sample, ids, every)
    judged = room.judge(
        rows, silicon_sample.left_out(sample), functools.partial(farm.run_all, console=console)
    )
    results.write_rows(room.written(judged), json)
    console.print(room.silicon_table(judged))
    for line in room.summary_lines(judged):
        console.print(line, soft_wrap=True)


def paper(
    quick: Annotated[
        bool, typer.Option(help="Few requests, one seed: about a quarter of an hour on two cores.")
    ] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            help="With --quick, too: seven fixed budgets of stock vLLM, and pressure, for each row."
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="Where tables and plots go, and each finished search: a later run goes on there."),
    ] = Path("build/paper"),
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Run the evaluation of Sarathi-Serve's paper again, in simulation, beside the published figures."""
    from rich.table import Table

    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.benchmark.paper import report as paper_report
    from vllm_sarathi.benchmark.paper import runs as room

    scale = replace(room.QUICK, sweep=sweep) if quick else room.FULL
    console = Console()
    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = room.rows_of(room.cells_of(scale), out / "cells", run_all)
    tables = paper_report.tables_of(rows)
    for path in paper_report.write_report(tables, out, scale.requests, scale.seeds):
        console.print(f"wrote {path}", soft_wrap=True)
    for name in ("capacity", "sweep", "published"):
        if not tables[name]:
            continue
        shown = Table(title=paper_report.TITLES[name])
        for column in paper_report.COLUMNS[name]:
            shown.add_column(column.replace("_", " "))
        for row in paper_report.texts(name, tables[name]):
            shown.add_row(*row)
        console.print(shown)
    results.write_rows(rows, json)
