"""What several commands take, and how it is checked."""

from pathlib import Path
from typing import Annotated

import typer

from autolrs_plugin.core.config import ConfigError

Run = Annotated[Path, typer.Argument(help="The run's folder: its run_dir.", metavar="RUN")]


def check_file(path: Path) -> None:
    """Raise ConfigError if a file cannot be written there, because it is a folder."""
    if path.is_dir():
        raise ConfigError(f"{str(path)!r}: is a folder; give a file in it.")


def no_folder(path: Path | None) -> Path | None:
    """Return the file that an option names, or say before the work that it is a folder."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder; give the name of a file.")
    return path
