"""How a command says what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from autolrs_plugin.core.config import ConfigError


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can cause into a sentence and exit code 2; anything else keeps its traceback.

    `clear_errors()` also decorates a command.
    """
    try:
        yield
    except typer.Exit:  # a RuntimeError of typer's, by which `find` gives its exit code
        raise
    except ModuleNotFoundError as error:
        _exit(f"this command needs {error.name}, which is not installed: pip install 'vllm-sarathi[autolrs]'")
    except (ConfigError, RuntimeError, OSError) as error:
        _exit(str(error))


def _exit(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
