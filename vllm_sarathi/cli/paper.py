"""`vllm-sarathi paper`."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import JsonOption, RayOption


def paper(
    quick: Annotated[
        bool, typer.Option(help="Few requests, one seed: about a quarter of an hour on two cores.")
    ] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            help="Add seven fixed budgets of stock vLLM, and pressure, to each row; without --quick they are in anyway."
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="Folder for tables, plots and finished searches, from which a later run resumes."),
    ] = Path("build/paper"),
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Repeat the evaluation of the Sarathi-Serve paper in simulation, beside the published figures."""
    from rich.table import Table

    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.benchmark.paper import report as paper_report
    from vllm_sarathi.benchmark.paper import runs as benchmark

    scale = replace(benchmark.QUICK, sweep=sweep) if quick else benchmark.FULL
    console = Console()
    run_all = functools.partial(farm.run_all, console=console, ray=ray)
    rows = benchmark.rows_of(benchmark.cells_of(scale), out / "cells", run_all)
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
