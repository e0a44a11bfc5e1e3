"""The command `bench live`: real servers under a real load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import JsonOption, with_options
from vllm_sarathi.core.config import ConfigError

WorkloadOption = Annotated[
    list[str] | None,
    typer.Option("--workload", help="short, long, mix, rush, burst or idle; may be repeated. Default: all."),
]
SloOption = Annotated[
    list[float] | None,
    typer.Option(
        "--tbt-slo-ms",
        help="SLO for the time between tokens, ms; may be repeated. Default: 150, 250, 500.",
    ),
]
SchedulersOption = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated names: sarathi, sarathi-sjf, sarathi-deadline, default (vLLM's own); default@80 and "
        "sarathi@256 have a fixed budget. Default: sarathi, vLLM's scheduler, and vLLM's scheduler with each of five "
        "budgets."
    ),
]
ScaleOption = Annotated[
    str,
    typer.Option(
        help="none: lengths, rates and SLOs as written for two CPU cores. auto: measure how fast this device prefills "
        "and decodes, and scale them so that it is loaded alike, --tbt-slo-ms and --ttft-slo-ms included; budgets "
        "named in --schedulers stay."
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        help="Write a report that can be shared: versions, device, measured speeds, rows; no names and no paths."
    ),
]
QuickOption = Annotated[
    bool,
    typer.Option(
        "--quick", help="A shorter benchmark: under 12 minutes (longer with --scale auto on slow CPUs)."
    ),
]
TtftOption = Annotated[float, typer.Option(help="The SLO for the time to first token of sarathi-deadline.")]
ModelOption = Annotated[str, typer.Option(help="A folder with a model, or its name on a model hub.")]
OutOption = Annotated[Path, typer.Option(help="Where data sets, raw results and logs go.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Use the finished runs in --out; keep the rows in --json.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the requests and their times.")]
NeighbourOption = Annotated[
    bool, typer.Option("--neighbour", help="Keep one core busy meanwhile, five seconds on and five off.")
]
CapacityOption = Annotated[
    bool,
    typer.Option("--capacity", help="Search the highest rate at which the server at --url keeps its SLO."),
]
UrlOption = Annotated[
    str | None, typer.Option(help="With --capacity: the server's address, such as http://127.0.0.1:8000.")
]
RateOption = Annotated[
    float | None, typer.Option(help="With --capacity: the first rate, requests per second.")
]
RequestsOption = Annotated[int | None, typer.Option(help="With --capacity: requests in a run.")]
SeedsOption = Annotated[int, typer.Option(help="With --capacity: searches, each with other requests.")]
DelayOption = Annotated[
    float, typer.Option(help="With --capacity: the longest acceptable median queueing delay, seconds.")
]


@dataclass(frozen=True)
class LiveOptions:
    """What runs, where, and where the results go."""

    workloads: WorkloadOption = None
    tbt_slos_ms: SloOption = None
    schedulers: SchedulersOption = None
    quick: QuickOption = False
    ttft_slo_ms: TtftOption = 2000.0
    model: ModelOption = "build/models/SmolLM2-135M-Instruct"
    out: OutOption = Path("build/bench/live")
    resume: ResumeOption = False
    seed: SeedOption = 0
    neighbour: NeighbourOption = False
    scale: ScaleOption = "none"
    report: ReportOption = None
    json: JsonOption = None


@with_options(LiveOptions)
def live(
    run: LiveOptions,
    capacity: CapacityOption = False,
    url: UrlOption = None,
    rate: RateOption = None,
    requests: RequestsOption = None,
    seeds: SeedsOption = 1,
    max_delay_s: DelayOption = 2.0,
) -> None:
    """Serve a real model with each scheduler under the same load, and compare how well each keeps the SLO."""
    if capacity:
        if run.scale != "none" or run.report is not None:
            raise ConfigError(
                "--capacity: searches its own rate; --scale and --report have no effect with it."
            )
        _capacity(run, url, rate, requests, seeds, max_delay_s)
        return
    from vllm_sarathi.benchmark.live.run import parse_options, run_live

    run_live(parse_options(**vars(run)), Console())


def _capacity(
    run: LiveOptions,
    url: str | None,
    rate: float | None,
    requests: int | None,
    seeds: int,
    max_delay_s: float,
) -> None:
    from vllm_sarathi.benchmark.capacity.simulated import capacity_table
    from vllm_sarathi.benchmark.common.results import write_rows
    from vllm_sarathi.benchmark.live.capacity import find_live, parse_live

    console = Console()
    asked = [
        parse_live(
            url=url,
            model=run.model,
            workload=name,
            tbt_slo_ms=slo_ms,
            max_delay_s=max_delay_s,
            scheduler=run.schedulers or "live",
            requests=requests,
            rate_qps=rate,
            seeds=seeds,
            out=run.out,
        )
        for name in run.workloads or ["short"]
        for slo_ms in run.tbt_slos_ms or [250.0]
    ]
    rows = []
    for each in asked:
        rows.append(find_live(each, console))
        console.print(capacity_table(rows[-1:]))
        write_rows(rows, run.json)
