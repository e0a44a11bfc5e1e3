"""Shows a run: tables of its searches and costs, and a picture. Reads the journal; needs no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import FILE_NAME, Journal, replay
from autolrs_plugin.core.state import Candidate, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLOUR = "#1f5fa8"
PROBE_COLOUR = "#c8c8c8"
CHOSEN_COLOUR = "#d62728"
VALIDATION_COLOUR = "#2c8a3d"


def load_run(run_dir: Path) -> Controller:
    """Return the controller of a run as its journal has it, also while the run is going on.

    Raises:
        JournalError: the journal cannot be read, is corrupted, or of another version.
    """
    journal = Journal.read(run_dir / FILE_NAME)
    controller = Controller(AutoLRSConfig.from_mapping(journal.header["config"], origin=str(journal.path)))
    for _ in replay(journal, controller):
        pass
    return controller


def run_tables(controller: Controller) -> Group:
    """Return the tables that `autolrs show` prints: the state, each stage's candidates, and the costs."""
    return Group(
        _summary(controller), *(_stage_table(stage) for stage in controller.stages), _costs(controller)
    )


def _summary(controller: Controller) -> str:
    config, ledger = controller.config, controller.ledger
    state = "complete" if controller.done else "not complete"
    lines = [
        f"{controller.step} of {config.max_steps} steps, {state}; learning rates {config.lr_range[0]:g} to "
        f"{config.lr_range[1]:g}, mode {config.mode}",
        f"search: {ledger.search.steps} steps on top, {ledger.search_share:.1%} of all",
    ]
    if controller.val_losses:
        step, loss = controller.val_losses[-1]
        lines.append(f"validation loss at step {step}: {loss:.5g}")
    return "\n".join(lines)


def _stage_table(stage: Stage) -> Table:
    table = Table(
        "",
        "learning rate",
        "steps",
        "training loss",
        "validation loss",
        "forecast",
        title_justify="left",
        expand=False,
    )
    table.title = f"stage {stage.index} ({stage.kind}) at step {stage.first_step}: {stage.chosen_lr:.3g}"
    table.caption = stage.reason
    nearest = _chosen(stage)
    for index, candidate in enumerate(stage.candidates):
        forecast = "diverged" if candidate.diverged else f"{candidate.forecast:.4f} ± {candidate.std:.4f}"
        table.add_row(
            ">" if candidate is nearest else str(index),
            f"{candidate.lr:.3g}",
            str(len(candidate.losses)),
            f"{candidate.losses[-1]:.4f}" if candidate.losses else "",
            "" if candidate.val_loss is None else f"{candidate.val_loss:.4f}",
            forecast,
        )
    return table


def _costs(controller: Controller) -> Table:
    ledger = controller.ledger
    table = Table("cost", "times", "steps", "tokens", "seconds", "of all", title_justify="left")
    rows = {
        "training": ledger.train,
        "search": ledger.search,
        "evaluation": ledger.evaluation,
        "evaluation for the search": ledger.search_evaluation,
        "snapshots and restores": ledger.snapshot,
    }
    total = ledger.seconds or 1.0
    for name, cost in rows.items():
        tokens = f"{cost.tokens:,}" if cost.tokens else ""
        table.add_row(
            name,
            str(cost.times),
            str(cost.steps),
            tokens,
            f"{cost.seconds:.1f}",
            f"{cost.seconds / total:.1%}",
        )
    table.add_row("deciding", "", "", "", f"{ledger.deciding_s:.1f}", f"{ledger.deciding_s / total:.1%}")
    return table


def draw_run(controller: Controller, path: Path) -> None:
    """Save a picture: the learning rate and the loss over the steps, each probe a branch from where it began.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Imported here: a quarter of a second, and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    rates, losses = figure.subplots(2, 1, sharex=True)
    for stage in controller.stages:
        chosen = _chosen(stage)
        for candidate in stage.candidates:
            colour = CHOSEN_COLOUR if candidate is chosen else PROBE_COLOUR
            order = 3 if candidate is chosen else 1
            steps = range(stage.first_step, stage.first_step + len(candidate.losses))
            rates.plot(steps, candidate.lrs[: len(steps)], color=colour, linewidth=1, zorder=order)
            losses.plot(steps, candidate.losses, color=colour, linewidth=1, zorder=order)
    rates.plot(controller.schedule.lrs, color=RUN_COLOUR, linewidth=2, zorder=4, label="run")
    losses.plot(controller.losses, color=RUN_COLOUR, linewidth=1, zorder=2, label="training loss of the run")
    if controller.val_losses:
        at, values = zip(*controller.val_losses, strict=True)
        losses.plot(at, values, "o-", color=VALIDATION_COLOUR, zorder=5, label="validation loss")
    losses.plot([], [], color=PROBE_COLOUR, label="probes")
    losses.plot([], [], color=CHOSEN_COLOUR, label="probe nearest to the choice")
    rates.set(yscale="log", ylabel="learning rate")
    losses.set(ylabel="loss", xlabel="step")
    _limit_losses(losses, controller)
    losses.legend(loc="upper right", frameon=False, fontsize=9)
    share = controller.ledger.search_share
    rates.set_title(
        f"{controller.step} steps, and a search of {controller.ledger.search.steps} ({share:.1%} of all)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _limit_losses(axes: "Axes", controller: Controller) -> None:
    """Keep exploding probes from pressing the run flat."""
    finite = [loss for loss in controller.losses if math.isfinite(loss)]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.1 * (high - low or 1.0)
        axes.set_ylim(low - margin, high + 3 * margin)


def _chosen(stage: Stage) -> Candidate | None:
    """Return the probe nearest to the learning rate that the stage chose."""
    alive = [c for c in stage.candidates if not c.diverged and c.lr > 0]
    if not alive or not stage.chosen_lr > 0:
        return None
    return min(alive, key=lambda c: abs(math.log(c.lr / stage.chosen_lr)))
