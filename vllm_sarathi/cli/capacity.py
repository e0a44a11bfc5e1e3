"""`vllm-sarathi capacity`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import (
    DEFAULT_SCHEDULERS,
    JsonOption,
    LoadOptions,
    RayOption,
    SchedulersOption,
    SeedsOption,
    announced_workload,
    read_names,
    with_options,
)


@with_options(LoadOptions)
def capacity(
    load: LoadOptions,
    schedulers: SchedulersOption = DEFAULT_SCHEDULERS,
    max_delay_s: Annotated[
        float, typer.Option(help="The longest acceptable median queueing delay, seconds.")
    ] = 2.0,
    seeds: SeedsOption = 3,
    ray: RayOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart into this file (PNG).")] = None,
    json: JsonOption = None,
) -> None:
    """Find the highest rate at which each scheduler keeps the SLO."""
    from vllm_sarathi.benchmark.capacity import simulated as benchmark
    from vllm_sarathi.benchmark.common import farm, results

    asked = load.asked(read_names(schedulers), seeds, max_delay_s=max_delay_s)
    benchmark.check_asked(asked)
    console = Console()
    tasks = benchmark.tasks_of(asked, announced_workload(asked, console))
    rows = benchmark.capacity_rows(tasks, functools.partial(farm.run_all, console=console, ray=ray))
    console.print(benchmark.capacity_table(rows))
    if warning := benchmark.burst_warning(rows, asked):
        console.print(warning, soft_wrap=True)
    if plot is not None:
        benchmark.capacity_plot(rows, plot)
    results.write_rows(rows, json)
