"""Progress lines of a running benchmark."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stages:
    """A moving line on a terminal, a line per stage anywhere else."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, description: str, total: float | None = None) -> None:
        """Show a new stage; `total` is the number of units (tokens, seconds) that end it, if known."""
        self._progress.reset(self._task, description=description, total=total)
        if not self.console.is_terminal:
            self.console.print(f"  {description} ...")

    def advance(self, units: float) -> None:
        """Move the bar."""
        self._progress.advance(self._task, units)
