"""`autolrs bench-find`: how far the rate that `find()` gives is from the oracle's, the best of five whole runs.

A finding is right if it is within FACTOR of the oracle's rate. One that is wrong and says that it is to be relied on is
counted by itself; one that says that it knows nothing is not right either.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from autolrs_plugin.benchmark.ours import LR_RANGE, as_arguments
from autolrs_plugin.benchmark.results import write_rows
from autolrs_plugin.benchmark.runner import Options, task_runs
from autolrs_plugin.benchmark.tasks import Task
from autolrs_plugin.integrations.torch_loop import AutoLRS

FACTOR = 3.0


@dataclass(frozen=True)
class Found:
    """One finding beside the oracle.

    Attributes:
        share: steps that it might take, as a fraction of the run's.
        steps: steps that it took.
        lr: the rate found; the optimizer's own where nothing is known.
        low, high: its interval.
        confident: whether it says that it is to be relied on.
        oracle_lr: the peak of the best cosine.
        reason: what it says.
    """

    task: str
    seed: int
    share: float
    steps: int
    lr: float
    low: float
    high: float
    confident: bool
    oracle_lr: float
    reason: str

    @property
    def off(self) -> float:
        """The factor between the rate found and the oracle's, at least 1."""
        return max(self.lr / self.oracle_lr, self.oracle_lr / self.lr)

    @property
    def right(self) -> bool:
        """Whether it is confident, and near enough."""
        return self.confident and self.off <= FACTOR


def run_finding(options: Options, shares: Sequence[float], console: Console) -> list[Found]:
    """Find a rate for each task, seed and share, print them, the farthest off first, and write them as JSON."""
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for task in options.tasks:
        steps = options.steps_of(task)
        oracles = {run.seed: run.lr for run in task_runs(options, task, console)}
        for seed, oracle_lr in oracles.items():
            found += [find(task, seed, steps, share, oracle_lr) for share in shares]
    for share in shares:
        console.print(finding_table([f for f in found if f.share == share]))
    write_rows(({**asdict(f), "off": f.off, "right": f.right} for f in found), options.json)
    return found


def find(task: Task, seed: int, steps: int, share: float, oracle_lr: float) -> Found:
    """Return what `find()` says of a task."""
    tuner = AutoLRS(**as_arguments(task, seed), max_steps=steps, lr_range=LR_RANGE, seed=seed, progress=False)
    f = tuner.find(share)
    return Found(task.name, seed, share, f.steps, f.lr, f.low, f.high, f.confident, oracle_lr, f.reason)


def finding_table(found: Sequence[Found]) -> Table:
    """Return the findings of one share as a table, with the figures of all of them below."""
    table = Table("task", "seed", "found", "interval", "oracle", "off by", "says", expand=False)
    for f in sorted(found, key=lambda f: (not f.confident, -f.off)):
        says = "rely on it" if f.confident else f"nothing: {f.reason}"
        interval = f"{f.low:.2g} to {f.high:.2g}"
        table.add_row(
            f.task, str(f.seed), f"{f.lr:.2g}", interval, f"{f.oracle_lr:.2g}", f"{f.off:.1f}", says
        )
    sure = [f for f in found if f.confident]
    right = sum(f.right for f in found)
    table.title = f"find(), {found[0].share:.0%} of the steps"
    table.caption = (
        f"within a factor of {FACTOR:g}: {right} of {len(found)} runs ({right / len(found):.0%}); confident in "
        f"{len(sure)}, and wrong in {len(sure) - right} of those"
    )
    return table
