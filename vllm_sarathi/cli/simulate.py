"""The commands that need no device: `simulate`, `capacity`, `validate` and `paper`."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import (
    DEFAULT_SCHEDULERS,
    FormatOption,
    JsonOption,
    LoadOptions,
    RateOption,
    RayOption,
    ScaleOption,
    SchedulersOption,
    SeedsOption,
    SloOption,
    TooLongOption,
    TraceOption,
    announced_workload,
    check_rate,
    read_names,
    with_options,
)


@with_options(LoadOptions)
def simulate(
    load: LoadOptions,
    rate: RateOption = None,
    schedulers: SchedulersOption = DEFAULT_SCHEDULERS,
    seeds: SeedsOption = 1,
    save_trace: Annotated[
        Path | None,
        typer.Option(help="Write the requests of the first seed to this file, in Mooncake's format."),
    ] = None,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Simulate one load on a deployment, and print the latencies of each scheduler."""
    from vllm_sarathi.benchmark.capacity import simulated as room
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.simulation.traces import write_trace

    check_rate(rate, load.trace)
    asked = load.asked(read_names(schedulers), seeds)
    room.check_asked(asked)
    console = Console()
    carried = announced_workload(asked, console)
    if save_trace is not None:
        write_trace(carried.at(rate, 0) if rate else carried.window(0), save_trace)
    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = room.simulate_rows(asked, carried, rate, run_all)
    console.print(room.simulate_table(rows))
    results.write_rows(rows, json)


@with_options(LoadOptions)
def capacity(
    load: LoadOptions,
    schedulers: SchedulersOption = DEFAULT_SCHEDULERS,
    max_delay_s: Annotated[float, typer.Option(help="The longest median queueing delay, seconds.")] = 2.0,
    seeds: SeedsOption = 3,
    ray: RayOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the answer in this file (PNG).")] = None,
    json: JsonOption = None,
) -> None:
    """Find the highest rate at which each scheduler keeps the SLO."""
    from vllm_sarathi.benchmark.capacity import simulated as room
    from vllm_sarathi.benchmark.common import farm, results

    asked = load.asked(read_names(schedulers), seeds, max_delay_s=max_delay_s)
    room.check_asked(asked)
    console = Console()
    tasks = room.tasks_of(asked, announced_workload(asked, console))
    rows = room.capacity_rows(tasks, functools.partial(farm.run_all, console=console, ray=ray))
    console.print(room.capacity_table(rows))
    if plot is not None:
        room.capacity_plot(rows, plot)
    results.write_rows(rows, json)


def validate(
    model: Annotated[str, typer.Option(help="A folder with a model.")] = "build/models/SmolLM2-135M-Instruct",
    workload: Annotated[
        str, typer.Option(help="validation, short, long, mix, rush or burst.")
    ] = "validation",
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
    """Check the simulator: the same load simulated, and on a real server on this CPU.

    With --silicon, against the measured TTFT and TPOT of servers on accelerators. Constants were fitted on the rows
    with even ids; the table is of odd ones: four of each group, or --all.
    """
    from vllm_sarathi.benchmark.common import results
    from vllm_sarathi.benchmark.profile import simulator as room
    from vllm_sarathi.core.config import ConfigError

    if silicon:
        if every and ids is not None:
            raise ConfigError("--all: has no effect with --ids, which names the rows.")
        _validate_silicon(ids, every, json)
        return
    for option, given in (("--ids", ids is not None), ("--all", every)):
        if given:
            raise ConfigError(f"{option}: has no effect without --silicon.")
    asked = room.parse_comparison(
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
