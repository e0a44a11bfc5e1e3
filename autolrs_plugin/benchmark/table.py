"""The benchmark's rows, and how they are shown: a table and a picture for each task."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from autolrs_plugin.core.files import written_whole

TARGET_SLACK = 0.05
"""The target is the oracle's loss of the same seed plus this share."""


@dataclass(frozen=True)
class Run:
    """One method on one task with one seed, as it was run.

    Attributes:
        lr: the learning rate that it ended with (the peak, where it has one).
        final_val_loss: of the weights that it hands over; infinite if it diverged.
        steps_total: compute in all, in training steps.
        steps_search: what of that did not train the weights handed over.
        seconds: wall time, without the judge's evaluations.
        curve: (compute so far in steps, validation loss).
        overheads: of ours: `deciding` (share of the wall time) and `snapshot_steps` (of one snapshot or restore).
        first_val_loss: before training.
    """

    task: str
    method: str
    seed: int
    lr: float
    final_val_loss: float
    steps_total: float
    steps_search: float
    seconds: float
    curve: list[list[float]]
    overheads: dict[str, float]
    first_val_loss: float = math.nan

    def save(self, path: Path) -> None:
        """Write the run as JSON, whole or not at all."""
        with written_whole(path, lasting=False) as scratch:
            scratch.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read a run that `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def targets(runs: Sequence[Run]) -> dict[tuple[str, int], float]:
    """Return the target loss of each (task, seed) that the oracle was run for."""
    return {
        (r.task, r.seed): r.final_val_loss * (1 + TARGET_SLACK)
        for r in runs
        if r.method == "oracle" and math.isfinite(r.final_val_loss)
    }


def regrets(runs: Sequence[Run]) -> dict[tuple[str, str, int], float]:
    """Return, by (task, method, seed), the share of what the oracle learns that a run does not: (L - O) / (F - O).

    L is the run's final loss, O the oracle's of the same seed, F the loss before training. Infinite for a run that
    diverged; runs without an oracle are left out. Below 0 where a run is better than the oracle.
    """
    oracles = {(r.task, r.seed): r.final_val_loss for r in runs if r.method == "oracle"}
    known = {}
    for r in runs:
        oracle = oracles.get((r.task, r.seed), math.inf)
        if oracle < r.first_val_loss:
            known[r.task, r.method, r.seed] = (r.final_val_loss - oracle) / (r.first_val_loss - oracle)
    return known


def steps_to(curve: Sequence[Sequence[float]], target: float | None) -> float | None:
    """Return the compute at which a curve is first at the target or below; None if it never is."""
    if target is None:
        return None
    return next((cost for cost, loss in curve if loss <= target), None)


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the runs as the rows of `--json`; a loss that is not finite is null there."""
    known, regret = targets(runs), regrets(runs)
    result = []
    for run in runs:
        target = known.get((run.task, run.seed))
        row = {k: v for k, v in asdict(run).items() if k not in ("curve", "overheads")}
        row["regret"] = regret.get((run.task, run.method, run.seed))
        for key in ("final_val_loss", "first_val_loss", "regret"):
            row[key] = row[key] if row[key] is not None and math.isfinite(row[key]) else None
        result.append({**row, "steps_to_target": steps_to(run.curve, target), "target": target})
    return result


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method, the method of the lowest mean loss first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return dict(sorted(groups.items(), key=lambda item: statistics.fmean(r.final_val_loss for r in item[1])))


def task_table(task: str, steps: int, runs: Sequence[Run]) -> Table:
    """Return the table of a task: mean and spread over the seeds."""
    known, regret = targets(runs), regrets(runs)
    seeds = len({r.seed for r in runs})
    table = Table(
        "method",
        "peak LR",
        "final val. loss",
        "worst seed",
        "regret",
        "worst seed",
        "C in all",
        "search",
        "C to target",
        "seconds",
        expand=False,
    )
    table.title = f"{task}: C = {steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    table.caption = f"target: the oracle's loss plus {TARGET_SLACK:.0%}"
    for method, group in by_method(runs).items():
        reached = [steps_to(r.curve, known.get((r.task, r.seed))) for r in group]
        lost = [v for r in group if (v := regret.get((r.task, r.method, r.seed))) is not None]
        hits = [cost / steps for cost in reached if cost is not None]
        to_target = f"{statistics.fmean(hits):.2f}" if hits else "-"
        if 0 < len(hits) < len(group):
            to_target += f" ({len(hits)} of {len(group)})"
        table.add_row(
            method,
            f"{statistics.geometric_mean([r.lr for r in group]):.2g}",
            spread([r.final_val_loss for r in group]),
            f"{max(r.final_val_loss for r in group):.4f}",
            f"{statistics.fmean(lost):.3f}" if lost else "-",
            f"{max(lost):.3f}" if lost else "-",
            f"{statistics.fmean(r.steps_total for r in group) / steps:.2f}",
            f"{statistics.fmean(r.steps_search / r.steps_total for r in group):.0%}",
            to_target,
            f"{statistics.fmean(r.seconds for r in group):.0f}",
        )
    return table


def summary_table(runs: Sequence[Run]) -> Table:
    """Return the table of all tasks together: regrets of each method, the worst run beside the mean."""
    groups: dict[str, list[tuple[float, str, int]]] = {}
    for (task, method, seed), regret in regrets(runs).items():
        groups.setdefault(method, []).append((regret, task, seed))
    table = Table("method", "runs", "mean regret", "median", "worst run", "which", expand=False)
    for method, group in sorted(groups.items(), key=lambda item: statistics.fmean(r for r, _, _ in item[1])):
        worst, task, seed = max(group)
        values = [regret for regret, _, _ in group]
        table.add_row(
            method,
            str(len(group)),
            f"{statistics.fmean(values):.3f}",
            f"{statistics.median(values):.3f}",
            f"{worst:.3f}",
            f"{task}, seed {seed}",
        )
    return table


def spread(losses: Sequence[float]) -> str:
    """Return mean and standard deviation of the losses, as text."""
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        return f"diverged ({bad} of {len(losses)})"
    text = f"{statistics.fmean(losses):.4f}"
    return f"{text} ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else text


def draw_task(task: str, steps: int, runs: Sequence[Run], path: Path) -> None:
    """Save a picture: the best loss so far over the compute, and the final losses of all seeds."""
    # Imported here: a quarter of a second, and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    curves, finals = figure.subplots(1, 2, width_ratios=(3, 2))
    groups = by_method(runs)
    first = min(r.seed for r in runs)
    for i, (method, group) in enumerate(groups.items()):
        ours = method == "autolrs"
        style = {"color": "#d62728" if ours else f"C{i % 10}", "zorder": 3 if ours else 2}
        run = next((r for r in group if r.seed == first), group[0])
        points = [(cost / steps, loss) for cost, loss in run.curve if math.isfinite(loss)]
        if points:
            at, losses = zip(*points, strict=True)
            best = [min(losses[: k + 1]) for k in range(len(losses))]
            curves.plot(at, best, label=method, linewidth=2.5 if ours else 1.2, **style)
        finite = [r.final_val_loss for r in group if math.isfinite(r.final_val_loss)]
        finals.plot(finite, [i] * len(finite), "o", **style)
    for (_, seed), target in targets(runs).items():
        if seed == first:
            curves.axhline(target, color="#808080", linewidth=0.8, linestyle=":", label="target")
    curves.set(xlabel="compute, in C", ylabel="best validation loss so far", title=task, yscale="log")
    curves.legend(fontsize=8, frameon=False)
    finals.set(xlabel="final validation loss, each seed", yticks=range(len(groups)), xscale="log")
    finals.set_yticklabels(list(groups))
    finals.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
