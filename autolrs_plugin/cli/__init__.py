"""The `autolrs` command: the modules of this package hold its subcommands.

A module imports what its command needs where the command runs: looking at a run needs no torch, and `--help` nothing
at all.
"""

from collections.abc import Callable

import typer

from autolrs_plugin import __version__
from autolrs_plugin.cli.bench import bench, bench_find, bench_overhead, bench_parallel, paper
from autolrs_plugin.cli.errors import clear_errors
from autolrs_plugin.cli.export import export
from autolrs_plugin.cli.find import find
from autolrs_plugin.cli.options import help_of
from autolrs_plugin.cli.preview import preview
from autolrs_plugin.cli.show import plot, show

app = typer.Typer(
    help="Look at, export and preview runs of AutoLRS, which finds the learning rate while training.",
    no_args_is_help=True,
)


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


_command: Callable[..., None]
# In the order in which `--help` lists them.
for _command in (show, plot, export, find, preview):
    app.command(help=help_of(_command))(clear_errors()(_command))
for _command in (bench, paper, bench_find, bench_parallel, bench_overhead):
    app.command(help=help_of(_command))(_command)


def main() -> None:
    """Entry point of the `autolrs` command."""
    app()
