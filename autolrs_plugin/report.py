"""Shows a run: tables of its searches and costs, and a picture. Reads the journal; needs no torch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from autolrs_plugin.core.actions import Probe
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.files import check_parent
from autolrs_plugin.core.journal import FILE_NAME, Journal
from autolrs_plugin.core.preview import Preview, shortcoming
from autolrs_plugin.core.replay import replay
from autolrs_plugin.core.schedule import phases
from autolrs_plugin.core.state import Candidate, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN_COLOUR = "#1f5fa8"
PROBE_COLOUR = "#c8c8c8"
CHOSEN_COLOUR = "#d62728"
DIVERGED_COLOUR = "#e08a1e"
VALIDATION_COLOUR = "#2c8a3d"

LEGEND = (
    "> the rate that was chosen (steps: none if no probe had it); losses: at the end of the probe; forecast: the loss "
    "that the search went by, with its standard deviation (±)"
)


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
    tables = [stage_table(stage) for stage in controller.stages]
    return Group(_summary(controller), *tables, *([LEGEND] if tables else []), _costs(controller))


def _summary(controller: Controller) -> str:
    config, ledger = controller.config, controller.ledger
    state = "complete" if controller.done else "not complete"
    lines = [
        f"{controller.step} of {config.max_steps} steps, {state}; lr_range {config.lr_range[0]:g} to "
        f"{config.lr_range[1]:g}, mode {config.mode}",
        f"search: {ledger.search.steps} steps on top, {ledger.search_share:.1%} of all{_budget_left(controller)}",
    ]
    if controller.val_losses:
        step, loss = controller.val_losses[-1]
        lines.append(f"validation loss at step {step}: {loss:.5g}")
    return "\n".join(lines)


def _budget_left(controller: Controller) -> str:
    """Return how much of the search's budget is left, where the mode has one."""
    state = controller.state
    if state.config.mode == "paper":
        return ""
    budget = state.config.search_budget * state.config.max_steps
    return f"; {max(0.0, state.budget_left_steps):.0f} of its budget of {budget:.0f} steps are left"


def stage_table(stage: Stage) -> Table:
    """Return the table of one search: its probes, and the rate that was chosen, which may be none of theirs."""
    table = _table("", "learning rate", "steps", "train loss", "val loss", "forecast", "±", left=1)
    table.title = f"stage {stage.index} ({stage.kind}) at step {stage.first_step}: {stage.chosen_lr:.3g}"
    table.caption = stage.reason
    chosen = [math.isclose(c.lr, stage.chosen_lr, rel_tol=1e-9) for c in stage.candidates]
    for index, candidate in enumerate(stage.candidates):
        forecast = (f"{candidate.forecast:.4f}", f"{candidate.std:.4f}")
        table.add_row(
            ">" if chosen[index] else str(index),
            f"{candidate.lr:.3g}",
            str(len(candidate.losses)),
            f"{candidate.losses[-1]:.4f}" if candidate.losses else "",
            "" if candidate.val_loss is None else f"{candidate.val_loss:.4f}",
            *(("diverged", "") if candidate.diverged else forecast),
        )
    if not any(chosen) and stage.chosen_lr > 0:
        table.add_row(">", f"{stage.chosen_lr:.3g}", "none", "", "", "", "")
    return table


def _costs(controller: Controller) -> Table:
    ledger = controller.ledger
    table = _table("cost", "times", "steps", "tokens", "seconds", "of all", left=1)
    rows = {
        "training": ledger.train,
        "search": ledger.search,
        "evaluation": ledger.evaluation,
        "evaluation for the search": ledger.search_evaluation,
        "snapshots and restores": ledger.snapshot,
    }
    seconds = {"deciding": ledger.deciding_s, "bookkeeping": ledger.bookkeeping_s}
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
    for name, taken_s in seconds.items():
        table.add_row(name, "", "", "", f"{taken_s:.1f}", f"{taken_s / total:.1%}")
    if ledger.snapshot_cost_steps:
        table.caption = (
            f"a snapshot or restore took {ledger.snapshot_cost_steps:.2f} of a training step, an evaluation "
            f"{ledger.eval_cost_steps:.2f}"
        )
    return table


def _table(*columns: str, left: int) -> Table:
    """Return a table whose first `left` columns are words and whose others are numbers."""
    table = Table(
        box=SIMPLE_HEAD, title_justify="left", caption_justify="left", title_style="bold", pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def preview_table(preview: Preview) -> Table:
    """Return the table that `autolrs preview` prints: what each phase of a run would take."""
    controller = preview.controller
    config, ledger = controller.config, controller.ledger
    table = _table("phase", "at step", "probes", "steps of each", "evaluations", "steps", left=1)
    for stage in controller.stages:
        probes = [(a, r) for a, r in preview.actions if isinstance(a, Probe) and a.stage == stage.index]
        lengths = [len(a.lrs) for a, _ in probes]
        each = f"{min(lengths)}" if len({*lengths}) == 1 else f"{min(lengths)} to {max(lengths)}"
        evaluations = sum(r.val_loss is not None for _, r in probes)
        steps = sum(len(r.losses) for _, r in probes)
        table.add_row(
            f"search: {stage.kind}",
            str(stage.first_step),
            str(len(probes)),
            each,
            str(evaluations),
            str(steps),
        )
    first = 0
    for name, steps in ({"training": config.max_steps} if config.mode == "paper" else phases(config)).items():
        evaluations = sum(first < at <= first + steps for at, _ in controller.val_losses)
        table.add_row(name, str(first), "", "", str(evaluations), str(steps))
        first += steps
    low, high = config.lr_range
    table.title = f"{config.max_steps} steps, lr_range {low:g} to {high:g}, mode {config.mode}"
    table.caption = (
        f"{ledger.steps_total} steps in all, {ledger.search_share:.1%} of them for the search; a probe that diverges "
        "ends early"
    )
    if lacking := shortcoming(config):
        table.caption += f"\n{lacking}"
    return table


def draw_run(controller: Controller, path: Path) -> None:
    """Save a picture: the learning rate and the loss over the steps, each probe a branch from where it began.

    Beside them, the largest search near by: its probes' losses, and the loss that it was told for each rate.

    Raises:
        ConfigError: `path` has no extension of a picture, or its folder does not exist.
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Imported here: a quarter of a second, and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ConfigError(
            f"{str(path)!r}: must have the extension of a picture; valid: {', '.join(sorted(kinds))}."
        )
    searches = [s for s in controller.stages if sum(not c.diverged for c in s.candidates) > 1]
    beside = max(searches, key=lambda s: s.search_steps, default=None)
    axes = figure.subplots(2, 2 if beside else 1, squeeze=False, width_ratios=(2.4, 1) if beside else (1,))
    rates, losses = axes[0][0], axes[1][0]
    rates.sharex(losses)
    rates.tick_params(labelbottom=False)
    for stage in controller.stages:
        _draw_branches(rates, losses, stage)
    rates.plot(controller.schedule.lrs, color=RUN_COLOUR, linewidth=2, zorder=4)
    losses.plot(controller.losses, color=RUN_COLOUR, linewidth=1, zorder=2, label="training loss")
    if controller.val_losses:
        at, values = zip(*controller.val_losses, strict=True)
        losses.plot(at, values, "o-", color=VALIDATION_COLOUR, zorder=5, label="validation loss")
    losses.plot([], [], color=PROBE_COLOUR, label="probes")
    losses.plot([], [], color=CHOSEN_COLOUR, label="probe nearest to the choice")
    losses.plot([], [], "x", color=DIVERGED_COLOUR, label="ended early: diverged")
    rates.set(yscale="log", ylabel="learning rate")
    losses.set(ylabel="loss", xlabel="step")
    _limit_losses(losses, [*controller.losses, *(loss for _, loss in controller.val_losses)])
    losses.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False, fontsize=9)
    share = controller.ledger.search_share
    rates.set_title(
        f"{controller.step} steps, and a search of {controller.ledger.search.steps} ({share:.1%} of all)"
    )
    if beside is not None:
        _draw_search(axes[0][1], axes[1][1], beside)
    check_parent(path)
    figure.savefig(path)


def _draw_branches(rates: "Axes", losses: "Axes", stage: Stage) -> None:
    """Draw a stage's probes over the steps that they would have been."""
    chosen = _chosen(stage)
    for candidate in stage.candidates:
        colour, order = (CHOSEN_COLOUR, 3) if candidate is chosen else (PROBE_COLOUR, 1)
        steps = range(stage.first_step, stage.first_step + len(candidate.losses))
        rates.plot(steps, candidate.lrs[: len(steps)], color=colour, linewidth=1, zorder=order)
        losses.plot(steps, candidate.losses, color=colour, linewidth=1, zorder=order)
        if candidate.diverged and steps:
            rates.plot(steps[-1], candidate.lrs[len(steps) - 1], "x", color=DIVERGED_COLOUR, zorder=order)


def _draw_search(curves: "Axes", told: "Axes", stage: Stage) -> None:
    """Draw one search: the losses of its probes over their own steps, and what it was told for each rate."""
    from matplotlib import colormaps  # here for the reason given in draw_run
    from matplotlib.colors import LogNorm

    lrs = [c.lr for c in stage.candidates]
    norm, colours = LogNorm(min(lrs), max(max(lrs), min(lrs) * 1.01)), colormaps["viridis"]
    for candidate in stage.candidates:
        colour = colours(norm(candidate.lr))
        curves.plot(candidate.losses, color=colour, linewidth=1.2)
        if candidate.diverged:
            # At the upper edge, wherever that is: there is no loss to draw.
            told.plot(candidate.lr, 0.97, "x", color=DIVERGED_COLOUR, transform=told.get_xaxis_transform())
        else:
            told.errorbar(
                candidate.lr, candidate.forecast, candidate.std, fmt="o", color=colour, capsize=2, zorder=3
            )
    _limit_losses(curves, [loss for c in stage.candidates if not c.diverged for loss in c.losses], most=8)
    _limit_losses(told, [c.forecast for c in stage.candidates if not c.diverged], most=8)
    told.axvline(stage.chosen_lr, color=CHOSEN_COLOUR, linewidth=1, label=f"chosen: {stage.chosen_lr:.3g}")
    told.legend(loc="best", framealpha=0.8, edgecolor="none", fontsize=9)
    told.set(xscale="log", xlabel="learning rate (the colours above)", ylabel="forecast loss")
    curves.set(ylabel="loss", xlabel="step of the probe")
    curves.set_title(f"stage {stage.index} ({stage.kind}) at step {stage.first_step}")


def _limit_losses(axes: "Axes", values: list[float], most: float = math.inf) -> None:
    """Keep exploding probes from pressing the others flat.

    Args:
        most: the height of the axes, in distances of the two lowest fifths of the losses from the least one.
    """
    finite = sorted(loss for loss in values if math.isfinite(loss))
    if finite:
        low, usual, high = finite[0], finite[2 * len(finite) // 5], finite[-1]
        if usual > low:
            high = min(high, low + most * (usual - low))
        margin = 0.1 * (high - low or abs(high) or 1.0)
        axes.set_ylim(low - margin, high + 2 * margin)


def _chosen(stage: Stage) -> Candidate | None:
    """Return the probe nearest to the learning rate that the stage chose."""
    alive = [c for c in stage.candidates if not c.diverged and c.lr > 0]
    if not alive or not stage.chosen_lr > 0:
        return None
    return min(alive, key=lambda c: abs(math.log(c.lr / stage.chosen_lr)))
