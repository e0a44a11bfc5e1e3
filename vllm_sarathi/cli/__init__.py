"""The `vllm-sarathi` command: each subcommand is a module of this package.

A module imports what its command needs where the command runs, so that `vllm-sarathi --help` stays quick and a
command that needs an extra fails only when called.
"""

from collections.abc import Callable
from typing import Any

import typer

from vllm_sarathi import __version__
from vllm_sarathi.cli.capacity import capacity
from vllm_sarathi.cli.classes import classes
from vllm_sarathi.cli.compare import compare
from vllm_sarathi.cli.demo import demo
from vllm_sarathi.cli.devices import devices
from vllm_sarathi.cli.errors import clear_errors
from vllm_sarathi.cli.fleet import fleet
from vllm_sarathi.cli.live import live
from vllm_sarathi.cli.options import RayCommand, help_of
from vllm_sarathi.cli.overhead import overhead
from vllm_sarathi.cli.paper import paper
from vllm_sarathi.cli.plan import plan
from vllm_sarathi.cli.profile import profile
from vllm_sarathi.cli.reference_model import reference_model
from vllm_sarathi.cli.simulate import simulate
from vllm_sarathi.cli.simulator import simulator
from vllm_sarathi.cli.top import top
from vllm_sarathi.cli.trace import trace
from vllm_sarathi.cli.validate import validate

app = typer.Typer(
    help="Watch, simulate and measure an SLO-aware scheduler for vLLM. To serve with it, run "
    "`vllm serve MODEL --scheduler sarathi`.",
    no_args_is_help=True,
)
bench = typer.Typer(
    help="Benchmarks: each prints a table, and writes its rows to --json FILE.", no_args_is_help=True
)
app.add_typer(bench, name="bench")


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


def _add(group: typer.Typer, command: Callable[..., None], **options: Any) -> None:
    group.command(help=help_of(command), **options)(clear_errors()(command))


_command: Callable[..., None]
# In the order in which `--help` lists them.
for _command in (demo, reference_model, trace):
    _add(app, _command)
_add(app, profile, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
_add(app, top)
for _command in (simulate, capacity, fleet, plan, validate, paper):
    _add(app, _command, cls=RayCommand)
for _command in (overhead, simulator, compare, live):
    _add(bench, _command)
for _command in (devices, classes):
    _add(bench, _command, cls=RayCommand)


def main() -> None:
    """Entry point of the `vllm-sarathi` command."""
    app()
