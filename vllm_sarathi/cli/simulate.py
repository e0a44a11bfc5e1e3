"""`vllm-sarathi simulate`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import (
    DEFAULT_SCHEDULERS,
    JsonOption,
    LoadOptions,
    RateOption,
    RayOption,
    SchedulersOption,
    SeedsOption,
    announced_workload,
    can_be_written,
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
        typer.Option(
            help="Write the requests of the first seed to this file, in Mooncake's format.",
            callback=can_be_written,
        ),
    ] = None,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Simulate one load on a deployment, and print the latencies of each scheduler."""
    from vllm_sarathi.benchmark.capacity import simulated as benchmark
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.simulation.traces import write_trace

    check_rate(rate, load.trace)
    asked = load.asked(read_names(schedulers), seeds)
    benchmark.check_asked(asked)
    console = Console()
    carried = announced_workload(asked, console)
    if save_trace is not None:
        write_trace(carried.at(rate, 0), save_trace)
    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = benchmark.simulate_rows(asked, carried, rate, run_all)
    console.print(benchmark.simulate_table(rows))
    results.write_rows(rows, json)
