"""`autolrs show` and `autolrs plot`: what a run has done."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autolrs_plugin.cli.options import Run, check_file


def show(run: Run) -> None:
    """Print what a run has done: its searches, candidates, forecasts and costs; also while it is going on."""
    from autolrs_plugin.report import load_run, run_tables

    Console().print(run_tables(load_run(run)))


def plot(run: Run, out: Annotated[Path, typer.Option("-o", "--out", help="The picture to write.")]) -> None:
    """Draw a run: learning rate and loss over the steps, with the probes as branches."""
    from autolrs_plugin.report import draw_run, load_run

    check_file(out)
    draw_run(load_run(run), out)
    typer.echo(f"the picture is in {out}")
