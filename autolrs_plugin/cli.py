"""The `autolrs` command."""

import typer

from autolrs_plugin import __version__
from autolrs_plugin.benchmark.command import bench

app = typer.Typer(help="Finds the learning rate while training.", no_args_is_help=True)


@app.callback()
def autolrs() -> None:
    """Finds the learning rate while training."""


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


app.command()(bench)


def main() -> None:
    """Entry point of the `autolrs` command."""
    app()
