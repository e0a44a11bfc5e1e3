"""What parallel probing saves: measured with actors on this machine, simulated for a cluster of workers.

Measured: the same search twice, each probe after the other in one process, and then on Ray actors; both decide the
same, bit for bit. Each process computes with one thread. The time is that of the search alone, from before its first
probe to after its last, the sending of states included; starting Ray and the actors is told apart.

Simulated: the actions of a real run and the seconds that each of them took, replayed with a number of workers. Probes
that were decided on together share the workers out among them, first come, first served; everything else takes place
in the job itself, one after the other, as it did. Every state that is sent costs what it was measured to cost.
"""

import functools
import heapq
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autolrs_plugin.benchmark.ours import LR_RANGE, as_arguments
from autolrs_plugin.benchmark.results import write_rows
from autolrs_plugin.benchmark.tasks import TASKS
from autolrs_plugin.core.actions import Action, Evaluate, Probe, Result, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.integrations.torch_loop import AutoLRS


@dataclass(frozen=True, slots=True)
class Done:
    """An action of a run.

    Attributes:
        kind: the action's name.
        seconds: how long it took.
        probes_ahead: for a probe, how many were decided on that had not been carried out, this one included; else 0.
    """

    kind: str
    seconds: float
    probes_ahead: int = 0


@dataclass
class Watch:
    """Notes every action of a run."""

    done: list[Done] = field(default_factory=list)
    _ahead: int = 0

    def on_action(self, action: Action, controller: Controller) -> None:
        self._ahead = len(controller.ahead)

    def on_step(self, lr: float, loss: float) -> None:
        pass

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        self.done.append(Done(type(action).__name__, result.seconds, self._ahead))

    def close(self) -> None:
        pass


def build(task_name: str) -> dict[str, Any]:
    """Return a reference task as AutoLRS takes it, here and in every actor."""
    return as_arguments(TASKS[task_name], 0)


def tuner_of(task: str, steps: int, parallel_probes: int, **options: Any) -> AutoLRS:
    """Return a run that has not begun."""
    settings: dict[str, Any] = {"max_steps": steps, "lr_range": LR_RANGE, "progress": False}
    return AutoLRS(**build(task), **settings, parallel_probes=parallel_probes, **options)


def makespan(actions: Sequence[Done], workers: int, send_s: float) -> float:
    """Return the wall time of a run's actions with `workers` to probe on, in seconds.

    Args:
        send_s: what it takes to send a state, once for each group of probes.
    """
    total, free, left = 0.0, [0.0] * workers, 0
    for action in actions:
        if action.kind != "Probe":
            total += action.seconds
            continue
        if left == 0:
            left, free = action.probes_ahead, [0.0] * workers
        heapq.heapreplace(free, free[0] + action.seconds)
        left -= 1
        if left == 0:
            total += max(free) + send_s
    return total


def untuned(actions: Sequence[Done]) -> float:
    """Return the wall time of the same run without a search: its steps, and its evaluations along the way."""
    return sum(a.seconds for a in actions if a.kind in (Train.__name__, Evaluate.__name__))


def search_seconds(tuner: AutoLRS) -> float:
    """Search, up to the first step of the run itself; return the wall time from the first probe on."""
    began = None
    while not isinstance(action := tuner.next_action(), Train):
        if began is None and isinstance(action, Probe):
            began = time.perf_counter()
        tuner.tell(tuner.perform(action))
    assert began is not None, "a run that searches nothing"
    return time.perf_counter() - began


def measure(task: str, steps: int, actors: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of a search, one probe after the other and on `actors` Ray actors, by turns."""
    import ray  # seconds to import, and an extra

    from autolrs_plugin.integrations.ray import RayProbes

    torch.set_num_threads(1)
    started = time.perf_counter()
    ray.init(num_cpus=actors, include_dashboard=False, object_store_memory=200 * 1024 * 1024)
    try:
        probes = RayProbes(functools.partial(build, task), actors=actors)
        probes.start()
        if len(probes.actors) < actors:
            raise RuntimeError(f"{len(probes.actors)} of {actors} actors could be had: nothing was measured.")
        starting_s = time.perf_counter() - started
        rows, same = [], True
        for _ in range(repeats):
            sequential, parallel = (tuner_of(task, steps, actors, probes=p) for p in (None, probes))
            seconds = search_seconds(sequential), search_seconds(parallel)
            rows.append(
                {"sequential_s": seconds[0], "parallel_s": seconds[1], "ratio": seconds[1] / seconds[0]}
            )
            same &= sequential.stages == parallel.stages
    finally:
        ray.shutdown()
    return {
        "task": task,
        "steps": steps,
        "actors": actors,
        "repeats": rows,
        "ratio": statistics.median(row["ratio"] for row in rows),
        "starting_s": starting_s,
        "same_decisions": same,
        "load_average": os.getloadavg()[0],
    }


def send_seconds(task: str) -> float:
    """Return what it takes to make a task's state one file's content and to make a state of that again."""
    loop = tuner_of(task, 1, 1)._loop
    loop.snapshot()
    started = time.perf_counter()
    loop.receive(loop.kept_state())
    return time.perf_counter() - started


def simulate(task: str, steps: int, workers: Sequence[int]) -> dict[str, Any]:
    """Return a run's wall time with each number of workers, in parts of the same run's without a search."""
    torch.set_num_threads(1)
    send_s = send_seconds(task)
    rows = []
    for count in workers:
        watch = Watch()
        tuner = tuner_of(task, steps, count, observers=[watch])
        tuner.run()
        base = untuned(watch.done)
        # Forecasts and Gaussian processes take their time in the job itself, whoever probes.
        tuned = makespan(watch.done, count, send_s) + tuner.ledger.deciding_s
        rows.append(
            {
                "workers": count,
                "untuned_s": base,
                "tuned_s": tuned,
                "deciding_s": tuner.ledger.deciding_s,
                "ratio": tuned / base,
                "actions": [asdict(action) for action in watch.done],
            }
        )
    return {"task": task, "steps": steps, "send_s": send_s, "rows": rows}


def bench_parallel(
    task: str,
    steps: int,
    actors: int,
    repeats: int,
    workers: Sequence[int],
    json_path: Path | None,
    console: Console,
) -> None:
    """Print what probing in parallel saves with actors here, and on a simulated cluster; write it to `json_path`."""
    measured = measure(task, steps, actors, repeats)
    title = f"{task}, {steps} steps: the search, measured; one thread for each process"
    table = Table("one after the other [s]", f"on {actors} actors [s]", "ratio", title=title)
    for row in measured["repeats"]:
        table.add_row(f"{row['sequential_s']:.2f}", f"{row['parallel_s']:.2f}", f"{row['ratio']:.3f}")
    console.print(table)
    console.print(
        f"Median ratio {measured['ratio']:.3f}, at a load average of {measured['load_average']:.1f}. Starting Ray and "
        f"the actors took {measured['starting_s']:.1f} s. "
        + ("The decisions are the same." if measured["same_decisions"] else "The decisions DIFFER.")
    )
    simulated = simulate(task, steps, workers)
    console.print(_simulated_table(simulated))
    if json_path is not None:
        write_rows(rows_of(measured, simulated), json_path)


def rows_of(measured: Mapping[str, Any], simulated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a result file: one for each measured pair of searches, one for each number of workers."""
    pairs = {key: value for key, value in measured.items() if key not in ("repeats", "ratio")}
    shared = {key: value for key, value in simulated.items() if key != "rows"}
    return [
        *({"part": "measured", **pairs, "repeat": i, **row} for i, row in enumerate(measured["repeats"])),
        *({"part": "simulated", **shared, **row} for row in simulated["rows"]),
    ]


def _simulated_table(simulated: Mapping[str, Any]) -> Table:
    title = f"{simulated['task']}, {simulated['steps']} steps: SIMULATED from measured actions"
    table = Table("workers", "tuned [s]", "untuned [s]", "tuned / untuned", title=title)
    for row in simulated["rows"]:
        figures = (f"{row['tuned_s']:.2f}", f"{row['untuned_s']:.2f}", f"{row['ratio']:.3f}")
        table.add_row(str(row["workers"]), *figures)
    return table
