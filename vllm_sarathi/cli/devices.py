"""`vllm-sarathi bench devices`."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_sarathi.cli.options import JsonOption, RayOption, read_names

SEED_SETS = ("judging", "design")

SeedSetOption = Annotated[
    str, typer.Option(help="judging, for reports; design, for choosing a constant of the scheduler.")
]


def seeds_of(seed_set: str, seeds: int) -> tuple[int, ...]:
    """Return the seeds of a set.

    Raises:
        ConfigError: an unknown set, or a number of seeds below 1.
    """
    from vllm_sarathi.benchmark.capacity import devices as benchmark
    from vllm_sarathi.core.config import check_choice, check_int

    check_int("seeds", seeds, minimum=1)
    check_choice("seed_set", seed_set, SEED_SETS)
    return tuple(benchmark.JUDGING_SEEDS if seed_set == "judging" else benchmark.DESIGN_SEEDS)[:seeds]


def devices(
    deployments: Annotated[str, typer.Option(help="Comma-separated names; default: all ten.")] = "",
    workloads: Annotated[str, typer.Option(help="chat, arxiv, mooncake; default: all.")] = "",
    slos: Annotated[
        str, typer.Option(help="tight (an operator's), strict and relaxed (the paper's); default: all.")
    ] = "",
    disturbances: Annotated[
        str, typer.Option(help="noise-2, noise-5, noise-10, pauses, neighbour.")
    ] = "noise-5",
    contenders: Annotated[
        str, typer.Option(help="Schedulers to compare with beside the two: prefill-first, pressure.")
    ] = "prefill-first,pressure",
    requests: Annotated[int, typer.Option(help="Requests in a run.")] = 300,
    seeds: Annotated[int, typer.Option(help="Runs with different requests, a row each.")] = 1,
    seed_set: SeedSetOption = "judging",
    quick: Annotated[bool, typer.Option(help="100 requests, the tight SLO, coarser searches.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for finished rows, from which a later run of the same code resumes.")
    ] = Path("build/devices"),
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Compare `sarathi` with the best of seven fixed budgets on devices with measured kernel times."""
    from vllm_sarathi.benchmark.capacity import devices as benchmark
    from vllm_sarathi.benchmark.capacity.cells import run_cells
    from vllm_sarathi.benchmark.capacity.search import TOLERANCE, check_requests
    from vllm_sarathi.benchmark.common import farm, results

    check_requests(requests, least=2)
    numbers = seeds_of(seed_set, seeds)
    cells = benchmark.cells_of(
        read_names(deployments) or tuple(benchmark.TIGHT_MS),
        read_names(workloads) or benchmark.WORKLOADS,
        read_names(slos) or (("tight",) if quick else benchmark.SLOS),
        numbers,
        100 if quick else requests,
        0.05 if quick else TOLERANCE,
        read_names(disturbances),
        read_names(contenders),
    )
    console = Console()
    console.print(f"{len(cells)} rows, {seed_set} seeds {numbers[0]} to {numbers[-1]}")

    def finished(rows: list[dict[str, Any]]) -> None:
        results.write_rows(benchmark.worst_first(rows), json)

    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = run_cells(cells, benchmark.measure, out, run_all, finished=finished)
    finished(rows)
    for table in ("capacity", "goodput"):
        mine = [row for row in rows if row["table"] == table]
        if mine:
            console.print(benchmark.gain_table(rows, table))
            console.print(benchmark.summary_line(mine))
    if disturbances:
        console.print(benchmark.disturbed_table(rows))
    for text in sorted({text for row in rows for text in row["warnings"]}):
        console.print(f"warning: {text}", soft_wrap=True)
