"""`autolrs paper`: the paper's own comparison (Jin et al., ICLR 2021, section 5), small.

| task         | the paper's model | hand-made schedule, scaled to C steps                                  | paper |
|--------------|-------------------|------------------------------------------------------------------------|-------|
| mnist-resnet | ResNet-50         | 0.1, a tenth after 30, 60 and 80 of 90 parts (Goyal et al. 2017)       | 1.22x |
| stdlib-gpt   | Transformer       | inverse square root after 4% of warm-up (Vaswani et al. 2017, 5.3)     | 1.43x |
| bert-mlm     | BERT              | warm-up over 10%, then linear to zero (Devlin et al. 2019, A.2)        | 1.5x  |

The target is the validation loss with which the hand-made schedule ends after C steps. AutoLRS trains runs of RUNS
times C steps, each from the first weights; the speedup is C divided by the steps of the shortest run that ends at the
target or below: its own training steps (the search uncounted, as published), and with its search (counted). Where no
run gets there, there is no speedup.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from autolrs_plugin.benchmark.methods import Assignment, simple
from autolrs_plugin.benchmark.ours import tuned
from autolrs_plugin.benchmark.tasks import TASKS
from autolrs_plugin.core.files import written_whole

RUNS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
QUICK_SHARE = 0.25

Schedule = Callable[[int], float]


def step_decay(peak: float, steps: int) -> Schedule:
    """Return the schedule of a ResNet: a tenth after 30, 60 and 80 of 90 parts."""
    return lambda step: peak * 0.1 ** sum(step >= steps * part / 90 for part in (30, 60, 80))


def inverse_square_root(peak: float, steps: int) -> Schedule:
    """Return the schedule of a Transformer: linear warm-up over 4%, then with the inverse square root of the step."""
    warmup = max(1, round(0.04 * steps))
    return lambda step: peak * min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


def linear(peak: float, steps: int) -> Schedule:
    """Return the schedule of a BERT: linear warm-up over 10%, then linear to zero."""
    warmup = max(1, round(0.1 * steps))
    return lambda step: peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


@dataclass(frozen=True)
class Original:
    """A hand-made schedule: its task, its shape, its published or customary peak, and the paper's speedup over it."""

    task: str
    model: str
    schedule: Callable[[float, int], Schedule]
    peak: float
    published: float


ORIGINALS = (
    Original("mnist-resnet", "ResNet, step decay", step_decay, 0.1, 1.22),
    Original("stdlib-gpt", "Transformer, inverse square root", inverse_square_root, 2e-3, 1.43),
    Original("bert-mlm", "BERT, warm-up and linear decay", linear, 1e-3, 1.5),
)


@dataclass(frozen=True)
class Row:
    """One model with one seed.

    Attributes:
        target: the validation loss that the hand-made schedule ends with.
        val_loss: that of the shortest run of AutoLRS that is at the target or below; of the longest, if none is.
        steps: C.
        train_steps: training steps of that run.
        all_steps: with its search.
        uncounted: C / train_steps; 0 where the target was not reached.
        counted: C / all_steps; 0 where the target was not reached.
        published: the paper's speedup.
    """

    model: str
    seed: int
    target: float
    val_loss: float
    steps: int
    train_steps: int
    all_steps: float
    uncounted: float
    counted: float
    published: float


def run_paper(out: Path, seeds: int, quick: bool, console: Console) -> list[Row]:
    """Run the comparison, and write it as Markdown, CSV and a picture."""
    rows = []
    for seed in range(seeds):
        for original in ORIGINALS:
            rows.append(compare(original, seed, QUICK_SHARE if quick else 1.0))
            console.print(f"{rows[-1].model}, seed {seed}: {_speedup(rows[-1].uncounted)} uncounted, "
                          f"{_speedup(rows[-1].counted)} counted")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    for name, content in (("paper.md", markdown(rows)), ("paper.csv", text.getvalue())):
        with written_whole(out / name) as scratch:
            scratch.write_text(content, encoding="utf-8")
    draw(rows, out / "paper.png")
    console.print(markdown(rows), soft_wrap=True)
    console.print(f"paper.md, paper.csv and paper.png are in {out}")
    return rows


def compare(original: Original, seed: int, share: float) -> Row:
    """Return the row of a model with a seed."""
    task = TASKS[original.task]
    steps = max(40, round(share * task.steps))
    assignment = Assignment(task, seed, steps, eval_cost_steps=2.0)
    target = simple(assignment, original.schedule(original.peak, steps), original.peak).final_val_loss
    for part in RUNS:
        length = round(part * steps)
        outcome = tuned(assignment, length, "staged")
        if outcome.final_val_loss <= target:
            break
    reached = outcome.final_val_loss <= target
    return Row(
        original.model,
        seed,
        target,
        outcome.final_val_loss,
        steps,
        length,
        outcome.steps_total,
        steps / length if reached else 0.0,
        steps / outcome.steps_total if reached else 0.0,
        original.published,
    )


def _speedup(value: float) -> str:
    return f"{value:.2f}x" if value else "not reached"


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| model | seed | hand-made loss | AutoLRS loss | search uncounted | search counted | paper (uncounted) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model} | {r.seed} | {r.target:.4f} | {r.val_loss:.4f} | {_speedup(r.uncounted)} | "
            f"{_speedup(r.counted)} | {r.published:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Save the speedups as bars, the paper's beside ours; each seed is a group of its own."""
    # Imported here: a quarter of a second, and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    bars = {"the paper": "published", "search uncounted": "uncounted", "search counted": "counted"}
    for i, (label, name) in enumerate(bars.items()):
        at = [k + 0.27 * (i - 1) for k in range(len(rows))]
        axes.bar(
            at,
            [getattr(r, name) for r in rows],
            0.25,
            label=label,
            color=("#c8c8c8", "#1f5fa8", "#d62728")[i],
        )
    axes.axhline(1.0, color="#404040", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{r.model}\nseed {r.seed}" for r in rows], fontsize=8)
    axes.set(ylabel="speedup to the hand-made schedule's final loss")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
