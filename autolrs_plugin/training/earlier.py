"""An earlier run that a new one follows: a warm start."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autolrs_plugin.core.config import ConfigError, check_lr_range
from autolrs_plugin.core.journal import FILE_NAME, Journal, JournalError
from autolrs_plugin.core.replay import plateau_of
from autolrs_plugin.training.checking import plain_numbers

logger = logging.getLogger("autolrs_plugin")


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """What is followed of an earlier run.

    Attributes:
        plateau: its learning rates, as the setting `warm_start`; None where there is no such run.
        optimizer: the name of its optimizer's class; empty where the journal does not have it.
    """

    plateau: tuple[tuple[float, float], ...] | None = None
    optimizer: str = ""

    def plateau_for(self, optimizer: torch.optim.Optimizer) -> tuple[tuple[float, float], ...] | None:
        """Return the learning rates; warn where they were another kind of optimizer's."""
        name = type(optimizer).__name__
        if self.optimizer not in ("", name):
            logger.warning(
                "warm_start: the earlier run was trained with %s and this one is with %s, and a learning rate of one "
                "optimizer is seldom one of another; leave warm_start out unless these two take the same.",
                self.optimizer,
                name,
            )
        return self.plateau


def earlier_run(warm_start: str | os.PathLike[str] | None, lr_range: Any) -> EarlierRun:
    """Return what is followed of the run in the folder `warm_start`: nothing for None.

    Raises:
        ConfigError: it is no path, the run has not got past its warm-up, or a rate of it is outside of `lr_range`.
        JournalError: it is no folder, or one that holds no run, or one of another version.
    """
    if warm_start is None:
        return EarlierRun()
    if not isinstance(warm_start, str | os.PathLike):
        raise ConfigError(f"warm_start={warm_start!r}: must be the folder of an earlier run (its run_dir).")
    if not os.fspath(warm_start):
        raise ConfigError(
            "warm_start='': is empty; give the folder of an earlier run (its run_dir), or None."
        )
    folder = Path(warm_start).expanduser()
    if not folder.is_dir():
        raise JournalError(
            f"warm_start={str(warm_start)!r}: is no folder; give that of an earlier run (its run_dir)."
        )
    try:
        journal = Journal.read(folder / FILE_NAME)
    except JournalError as error:
        raise JournalError(f"warm_start={str(warm_start)!r}: {error}") from error
    points = plateau_of(journal)
    low, high = check_lr_range(plain_numbers({"lr_range": lr_range})["lr_range"])
    inside = tuple((at, min(max(lr, low), high)) for at, lr in points)
    # A rate at an end of the range may have been rounded to beyond it.
    if not all(
        math.isclose(lr, there, rel_tol=1e-9) for (_, lr), (_, there) in zip(points, inside, strict=True)
    ):
        rates = [lr for _, lr in points]
        raise ConfigError(
            f"warm_start={str(warm_start)!r}: follows learning rates from {min(rates):.3g} to {max(rates):.3g}, and "
            f"lr_range=({low:g}, {high:g}) does not hold them all; widen it, or leave warm_start out."
        )
    return EarlierRun(inside, str(journal.header["run"].get("optimizer", "")))
