"""Runs methods on tasks, each (task, method, seed) once: what is in the folder already is not run again."""

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from autolrs_plugin import __version__
from autolrs_plugin.benchmark.methods import PEERS, Assignment, Outcome
from autolrs_plugin.benchmark.ours import (
    autolrs,
    autolrs_no_prior,
    autolrs_once,
    autolrs_paper,
    autolrs_warm,
)
from autolrs_plugin.benchmark.results import write_rows
from autolrs_plugin.benchmark.table import Run, draw_task, rows, summary_table, task_table
from autolrs_plugin.benchmark.tasks import Problem, Task
from autolrs_plugin.core.files import written_whole

METHODS: dict[str, Callable[[Assignment], Outcome]] = {
    "autolrs": autolrs,
    "autolrs-no-prior": autolrs_no_prior,
    "autolrs-once": autolrs_once,
    "autolrs-warm": autolrs_warm,
    "autolrs-paper": autolrs_paper,
    **PEERS,
}
QUICK_SHARE = 0.25
"""`--quick`: so much of each task's C."""

TIMED_STEPS, TIMED_EVALUATIONS = 12, 3


@dataclass(frozen=True)
class Options:
    """What is to be run.

    Attributes:
        tasks: the reference tasks.
        methods: names out of METHODS.
        seeds: how many seeds, from 0.
        quick: whether C is shortened.
        out: where results are kept, and pictures go.
        json: where the rows go.
    """

    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    seeds: int
    quick: bool
    out: Path
    json: Path

    def steps_of(self, task: Task) -> int:
        """Return C of a task."""
        return max(20, round(task.steps * QUICK_SHARE)) if self.quick else task.steps


def run_bench(options: Options, console: Console) -> list[Run]:
    """Run what is missing, print a table for each task, save its picture, and write the rows."""
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for task in options.tasks:
        steps = options.steps_of(task)
        done = task_runs(options, task, console)
        console.print(task_table(task.name, steps, done))
        _print_overheads(done, console)
        picture = options.out / f"{task.name}.png"
        draw_task(task.name, steps, done, picture)
        console.print(f"{task.name}: picture in {picture}")
        runs += done
        write_rows(rows(runs), options.json)
    if len(options.tasks) > 1:
        console.print(summary_table(runs))
    return runs


def task_runs(options: Options, task: Task, console: Console) -> list[Run]:
    """Return the runs of a task; what is missing in the folder is run."""
    steps = options.steps_of(task)
    eval_cost_steps = _eval_cost_steps(options.out, task)
    wanted = [(method, seed) for seed in range(options.seeds) for method in options.methods]
    paths = {key: _path(options.out, task, steps, eval_cost_steps, *key) for key in wanted}
    missing = [key for key in wanted if not paths[key].exists()]
    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(steps * (len(task.grid) if method == "oracle" else 1) for method, _ in missing)
        bar = progress.add_task("", total=total, what=task.name)
        for method, seed in missing:
            progress.update(bar, what=f"{task.name}: {method}, seed {seed}")
            assignment = Assignment(
                task, seed, steps, eval_cost_steps, on_steps=lambda taken: progress.advance(bar, taken)
            )
            run = _run(assignment, method)
            run.save(paths[method, seed])
            progress.console.print(
                f"{task.name} {method} seed {seed}: {run.final_val_loss:.4f} in {run.seconds:.0f} s"
            )
    return [Run.load(paths[key]) for key in wanted]


def _run(assignment: Assignment, method: str) -> Run:
    started = time.perf_counter()
    outcome = METHODS[method](assignment)
    return Run(
        task=assignment.task.name,
        method=method,
        seed=assignment.seed,
        lr=float(outcome.lr),
        final_val_loss=float(outcome.final_val_loss),
        steps_total=outcome.steps_total,
        steps_search=outcome.steps_search,
        # The outcome's own seconds are those of the judge, as a negative number.
        seconds=time.perf_counter() - started + outcome.seconds,
        curve=[list(point) for point in outcome.curve],
        overheads=outcome.overheads,
        first_val_loss=_first_val_loss(assignment.task, assignment.seed),
    )


@functools.cache
def _first_val_loss(task: Task, seed: int) -> float:
    return task.build(seed).validate()


def _path(out: Path, task: Task, steps: int, eval_cost_steps: float, method: str, seed: int) -> Path:
    """Return where a result is kept: its name changes with every setting that it depends on."""
    settings = [__version__, steps, eval_cost_steps, task.kind, task.default_lr, task.grid, task.clip]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return out / f"{task.name}-{method}-{seed}-{digest}.json"


def _eval_cost_steps(out: Path, task: Task) -> float:
    """Return what an evaluation costs in training steps: measured once for a folder, so that a run can resume."""
    path = out / f"{task.name}-eval-cost.json"
    if not path.exists():
        cost = measure_eval_cost(task, task.build(0))
        with written_whole(path) as scratch:
            scratch.write_text(json.dumps({"eval_cost_steps": round(cost, 2)}), encoding="utf-8")
    return float(json.loads(path.read_text(encoding="utf-8"))["eval_cost_steps"])


def measure_eval_cost(task: Task, problem: Problem) -> float:
    """Return the time of an evaluation in training steps: medians of several."""
    optimizer = task.optimizer(problem, task.default_lr)
    rng = np.random.default_rng(0)
    problem.model.train()

    def step() -> None:
        task.step(problem, optimizer, problem.draw(rng))

    step()  # the first of each is slower
    problem.validate()
    return _median_s(problem.validate, TIMED_EVALUATIONS) / _median_s(step, TIMED_STEPS)


def _median_s(work: Callable[[], object], times: int) -> float:
    # Time on the processor: a busy machine would distort the ratio of two wall times.
    seconds = []
    for _ in range(times):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def _print_overheads(runs: Sequence[Run], console: Console) -> None:
    ours = [r.overheads for r in runs if r.method == "autolrs"]
    if ours:
        console.print(
            f"autolrs: decisions take {statistics.fmean(o['deciding'] for o in ours):.2%} of the wall time; "
            f"a snapshot or restore costs {statistics.fmean(o['snapshot_steps'] for o in ours):.2f} steps"
        )
