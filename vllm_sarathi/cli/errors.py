"""How a command says what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.errors import VllmMissingError
from vllm_sarathi.core.step_trace import StepTraceError


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can cause into a sentence and exit code 1; anything else keeps its traceback.

    `clear_errors()` also decorates a command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        _exit(
            f"this command needs {error.name}, which is not installed: pip install 'vllm-sarathi[bench]', "
            "beside a vLLM"
        )
    except VllmMissingError:
        _exit(str(VllmMissingError("this command")))
    except BrokenPipeError:  # who reads what is printed has seen enough: Click ends without a word
        raise
    except (ConfigError, StepTraceError, RuntimeError, OSError) as error:
        _exit(str(error))


def _exit(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
