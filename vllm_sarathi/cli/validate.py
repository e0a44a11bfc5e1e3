"""`vllm-sarathi validate`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import (
    FormatOption,
    JsonOption,
    ScaleOption,
    SchedulersOption,
    SloOption,
    TooLongOption,
    TraceOption,
    read_names,
)


def validate(
    model: Annotated[str, typer.Option(help="A folder with a model.")] = "build/models/SmolLM2-135M-Instruct",
    workload: Annotated[
        str, typer.Option(help="validation, short, long, mix, rush or burst.")
    ] = "validation",
    schedulers: SchedulersOption = "default,sarathi",
    tbt_slo_ms: SloOption = 250.0,
    requests: Annotated[
        int | None, typer.Option(help="Requests in a run; default: the workload's own number.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second; default: the workload's own rate.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs with different requests, whose means are reported.")] = 1,
    trace: TraceOption = None,
    trace_format: FormatOption = "csv",
    too_long: TooLongOption = "refuse",
    time_scale: ScaleOption = 1.0,
    out: Annotated[Path, typer.Option(help="Where raw results and logs go.")] = Path("build/validate"),
    silicon: Annotated[
        bool,
        typer.Option(
            "--silicon", help="Compare with measured accelerators instead: the sample of aiconfigurator-core."
        ),
    ] = False,
    ids: Annotated[
        Path | None,
        typer.Option(help="With --silicon: a file with the ids of the rows to simulate, one per line."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="With --silicon: all odd rows, not a few of each group.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Compare simulation with a real server on this CPU, under the same load.

    With --silicon, compare it with the measured TTFT and TPOT of servers on accelerators. Constants were fitted on
    the rows with even ids; the table is of odd ones: four of each group, or --all.
    """
    from vllm_sarathi.benchmark.common import results
    from vllm_sarathi.benchmark.profile import simulator as benchmark
    from vllm_sarathi.core.config import ConfigError

    if silicon:
        if every and ids is not None:
            raise ConfigError("--all: has no effect with --ids, which names the rows.")
        _validate_silicon(ids, every, json)
        return
    for option, given in (("--ids", ids is not None), ("--all", every)):
        if given:
            raise ConfigError(f"{option}: has no effect without --silicon.")
    asked = benchmark.parse_comparison(
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
    rows = benchmark.validate(asked.choices, asked.loads, out, console)
    console.print(benchmark.validate_table(rows))
    results.write_rows(rows, json)


def _validate_silicon(ids: Path | None, every: bool, json: Path | None) -> None:
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.benchmark.profile import silicon as benchmark
    from vllm_sarathi.benchmark.profile import silicon_sample

    console = Console()
    sample = silicon_sample.read_sample()
    rows = benchmark.asked_rows(sample, ids, every)
    judged = benchmark.judge(
        rows, silicon_sample.left_out(sample), functools.partial(farm.run_all, console=console)
    )
    results.write_rows(benchmark.written(judged), json)
    console.print(benchmark.silicon_table(judged))
    for line in benchmark.summary_lines(judged):
        console.print(line, soft_wrap=True)
