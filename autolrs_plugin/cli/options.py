"""What several commands take, and how it is checked."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.files import check_parent

Run = Annotated[Path, typer.Argument(help="The run's folder: its run_dir.", metavar="RUN")]


def check_file(path: Path) -> None:
    """Raise ConfigError if a file cannot be written there: it is a folder, or its folder is missing."""
    if path.is_dir():
        raise ConfigError(f"{str(path)!r}: is a folder; give a file in it.")
    check_parent(path)


def no_folder(path: Path | None) -> Path | None:
    """Return the file that an option names, or say before the work that it is a folder."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder; give the name of a file.")
    return path


def help_of(command: Callable[..., Any]) -> str:
    """Return a command's docstring with each paragraph on one line: Typer would keep the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))
