"""Shows a run while it goes on: a bar, a line per stage, scalars for TensorBoard."""

import logging
import math
import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Result, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.preview import shortcoming
from autolrs_plugin.training.checking import named
from autolrs_plugin.training.ports import Observer

logger = logging.getLogger("autolrs_plugin")


def observers_for(config: AutoLRSConfig, progress: bool, tensorboard: Any) -> list[Observer]:
    """Return who shows a run.

    Args:
        progress: whether to show a bar; the lines are printed above it, and logged without it.
        tensorboard: a folder, a SummaryWriter or anything with its `add_scalar`, or None.

    Raises:
        TypeError: `tensorboard` is none of these.
        ModuleNotFoundError: TensorBoard is not installed.
    """
    observers: list[Observer] = [Bar(config.max_steps) if progress else StageLog()]
    if tensorboard is not None:
        observers.append(Scalars(_writer(tensorboard)))
    return observers


def warn_beforehand(controller: Controller) -> None:
    """Log what a run that begins has no room for, or does not use; nothing of one that is gone on with."""
    if controller.step or controller.stages:
        return
    config = controller.config
    if config.prior_lr is not None and config.warm_start is None and config.starting_lr is None:
        low, high = config.lr_range
        logger.warning(
            "the optimizer's learning rate of %.3g is outside of lr_range=(%g, %g), so it is not used, and the search "
            "begins in the middle of that, at %.3g; give an lr_range that it is in, or prior=None.",
            *(config.prior_lr, low, high, math.sqrt(low * high)),
        )
    if sentence := shortcoming(config):
        logger.warning("%s", sentence)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}." if words else ""


class StageLog:
    """Logs one line for each search that has come to a decision."""

    def __init__(self) -> None:
        self._stages: int | None = None

    def on_action(self, action: Action, controller: Controller) -> None:
        """Count the stages that a run that is gone on with had come to before."""
        if self._stages is None:
            self._stages = len(controller.stages)

    def on_step(self, lr: float, loss: float) -> None:
        """Steps are not logged."""

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        """Log the stages that are new."""
        for stage in controller.stages[self._stages :]:
            finite = [
                math.isfinite(c.forecast) or all(map(math.isfinite, c.losses)) for c in stage.candidates
            ]
            if finite and not any(finite):
                rates = [c.lr for c in stage.candidates]
                logger.warning(
                    "no probe of stage %d, at step %d, had only finite losses, at learning rates from %.3g to %.3g, so "
                    "it has found nothing out, and goes on with %.3g; look into the loss and the data.",
                    *(stage.index, stage.first_step, min(rates), max(rates), stage.chosen_lr),
                )
            budget = controller.config.search_budget * controller.config.max_steps
            self.say(
                f"stage {stage.index} ({stage.kind}) at step {stage.first_step}: learning rate {stage.chosen_lr:.3g} "
                f"after {len(stage.candidates)} probes ({stage.search_steps} steps; search so far "
                f"{controller.ledger.search.steps} of {budget:.0f}). {_sentence(stage.reason)}".rstrip()
            )
        self._stages = len(controller.stages)

    def close(self) -> None:
        """Nothing is open."""

    def say(self, line: str) -> None:
        """Log a line."""
        logger.info(line)


class StageLines(StageLog):
    """Prints the line of each search, and one when it begins: for a framework that has a bar of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._announced = -1

    def on_action(self, action: Action, controller: Controller) -> None:
        """Say that a search begins."""
        super().on_action(action, controller)
        if isinstance(action, Probe) and action.stage != self._announced:
            self._announced = action.stage
            self.say(f"stage {action.stage} at step {controller.step}: searching for a learning rate")

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(f"AutoLRS: {line}", highlight=False)


class Bar(StageLog):
    """A progress bar over the run's own steps; the lines of the stages stand above it."""

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self._max_steps = max_steps
        self._progress: Progress | None = None
        self._task: Any = None
        self._training = False
        self._where = ""

    def on_action(self, action: Action, controller: Controller) -> None:
        """Say what is going on now."""
        super().on_action(action, controller)
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=self._max_steps)
            self._progress.start()
        self._training = isinstance(action, Train)
        if isinstance(action, Probe):
            self._where = f"stage {action.stage}, probe {action.index}"
        elif isinstance(action, Evaluate):
            self._where = "evaluate"
        elif self._training:
            self._where = "train"
        self._progress.update(self._task, description=self._where, completed=controller.step)
        if isinstance(action, Done):
            self._progress.update(self._task, description="done")
            self.close()

    def on_step(self, lr: float, loss: float) -> None:
        """Show the step's rate and loss."""
        assert self._progress is not None
        text = f"{self._where}: lr {lr:.2e} loss {loss:.4f}"
        self._progress.update(self._task, description=text, advance=1 if self._training else 0)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._progress is not None:
            self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        assert self._progress is not None
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Scalars(StageLog):
    """Writes the run's own steps to TensorBoard; probes are no progress and appear only as their cost."""

    def __init__(self, writer: Any) -> None:
        super().__init__()
        self._writer = writer

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        """Write what the run's own steps and evaluations gave, and what each stage decided."""
        add = self._writer.add_scalar
        if isinstance(action, Train):
            for offset, (lr, loss) in enumerate(zip(action.lrs, result.losses, strict=True)):
                add("autolrs/lr", lr, action.first_step + offset)
                add("autolrs/train_loss", loss, action.first_step + offset)
        elif isinstance(action, Evaluate):
            add("autolrs/val_loss", result.val_loss, action.step)
        elif isinstance(action, Probe):
            add("autolrs/search_steps", controller.ledger.search.steps, controller.step)
        for stage in controller.stages[self._stages :]:
            add("autolrs/chosen_lr", stage.chosen_lr, stage.first_step)
        self._stages = len(controller.stages)

    def close(self) -> None:
        """Write what is still in memory."""
        if hasattr(self._writer, "flush"):
            self._writer.flush()


def _writer(tensorboard: Any) -> Any:
    if hasattr(tensorboard, "add_scalar"):
        return tensorboard
    if not isinstance(tensorboard, str | os.PathLike):
        raise TypeError(
            f"tensorboard: {named(tensorboard)} is neither a folder nor has it add_scalar(), as a "
            "SummaryWriter does."
        )
    try:
        # Imported here: TensorBoard takes seconds and is seldom installed.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "tensorboard: is not installed: pip install tensorboard", name="tensorboard"
        ) from error
    return SummaryWriter(os.fspath(tensorboard))
