"""What `vllm-sarathi simulate` and `vllm-sarathi capacity` do: read what was asked, run it, show tables and plots."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.capacity import (
    Criterion,
    Found,
    Task,
    Workload,
    check_search,
    find,
    rehearse,
    row_of,
)
from vllm_sarathi.core.config import BASELINES, STOCK_SCHEDULER, ConfigError, check_choice, nearest_hint
from vllm_sarathi.simulation.deployment import deployment, scheduler_choice
from vllm_sarathi.simulation.traces import read_trace
from vllm_sarathi.simulation.workload import WORKLOADS, synthetic

GOODPUT_SHARE = 0.99
"""Requests with promises of their own that have to keep them."""


@dataclass(frozen=True)
class Asked:
    """What the command line asked for.

    Attributes:
        deployment: by name.
        workload: by name; the trace's file name where there is a trace.
        schedulers: names, each with or without `@N`.
        tbt_slo_ms: the promise; None for none.
        requests: how many.
        seeds: how many.
        arrivals: how a synthetic workload's requests come.
        max_delay_s: the longest median scheduling delay, seconds.
        trace, trace_format, too_long, time_scale: as `read_trace` takes them.
        settings: of SarathiConfig, for `sarathi` without a fixed budget.
    """

    deployment: str
    workload: str
    schedulers: tuple[str, ...]
    tbt_slo_ms: float | None
    requests: int
    seeds: int
    arrivals: str = "poisson"
    max_delay_s: float = 2.0
    trace: Path | None = None
    trace_format: str = "csv"
    too_long: str = "refuse"
    time_scale: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def criterion(self) -> Criterion:
        """When a run counts as carried."""
        return Criterion(self.tbt_slo_ms, max_delay_s=self.max_delay_s)

    def scheduler_settings(self, scheduler: str) -> tuple[tuple[str, Any], ...]:
        """Return the settings of one of the schedulers; baselines and fixed budgets take no promise."""
        name, at, _ = scheduler.partition("@")
        if name == STOCK_SCHEDULER or name in BASELINES:
            return ()
        promise = () if at or self.tbt_slo_ms is None else (("tbt_slo_ms", self.tbt_slo_ms),)
        return (*promise, *self.settings)


def check_asked(asked: Asked) -> None:
    """Check everything before the first run.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    deployment(asked.deployment)
    check_search(asked.requests, asked.seeds, asked.criterion)
    if not asked.schedulers:
        raise ConfigError("--schedulers: names none.")
    for name in asked.schedulers:
        scheduler_choice(name, **dict(asked.scheduler_settings(name)))
    if asked.trace is None and asked.workload not in (*WORKLOADS, "classes"):
        raise ConfigError(
            f"--workload {asked.workload!r}: unknown; {nearest_hint(asked.workload, (*WORKLOADS, 'classes'))}"
        )
    check_choice("arrivals", asked.arrivals, ("poisson", "gamma", "fixed"))


def workload_of(asked: Asked) -> tuple[Workload, int]:
    """Return the workload, and how many requests of a trace were too long for the model."""
    if asked.trace is None:
        return Workload(asked.workload, asked.requests, asked.arrivals), 0
    place = deployment(asked.deployment)
    trace = read_trace(asked.trace, asked.trace_format, place.max_tokens, asked.too_long, asked.time_scale)
    return Workload(asked.trace.name, asked.requests, trace=trace.requests[: asked.requests]), trace.skipped


def tasks_of(asked: Asked, workload: Workload) -> list[list[Task]]:
    """Return for each scheduler its searches, one for each seed."""
    return [
        [
            Task(asked.deployment, name, workload, asked.criterion, seed, asked.scheduler_settings(name))
            for seed in range(asked.seeds)
        ]
        for name in asked.schedulers
    ]


def goodput_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Return the searches by the second criterion; none where no request carries a promise of its own."""
    first = tasks[0].workload.at(1.0, 0)
    if not any(r.tbt_slo_ms is not None or r.ttft_slo_ms is not None for r in first):
        return []
    return [replace(t, criterion=replace(t.criterion, goodput=GOODPUT_SHARE)) for t in tasks]


def capacity_rows(tasks: Sequence[Sequence[Task]], run_all: Any) -> list[dict[str, Any]]:
    """Return a row for each scheduler.

    Args:
        tasks: as `tasks_of` gives them.
        run_all: `farm.run_all` with all but its first two arguments.
    """
    plans = [(list(group), goodput_tasks(group)) for group in tasks]
    flat = [task for group, goodput in plans for task in (*group, *goodput)]
    found: list[Found] = run_all(find, flat)
    rows, at = [], 0
    for group, goodput in plans:
        middle, end = at + len(group), at + len(group) + len(goodput)
        rows.append(row_of(group, found[at:middle], found[middle:end]))
        at = end
    return rows


def simulate_row(rate_qps: float | None, task: Task) -> dict[str, Any]:
    """Return the figures of one run at a rate; a trace without a rate is played as it is."""
    if rate_qps is None:
        span_s = task.workload.trace[-1].arrival_s - task.workload.trace[0].arrival_s
        rate_qps = (len(task.workload.trace) - 1) / span_s if span_s > 0 else 1.0
    outcome = rehearse(task, rate_qps, to_the_end=True)
    assert outcome is not None
    return {
        "deployment": task.deployment,
        "workload": task.workload.name,
        "scheduler": task.scheduler,
        "rate_qps": rate_qps,
        "seed": task.seed,
        **outcome.to_mapping(),
    }


def simulate_rows(asked: Asked, rate_qps: float | None, run_all: Any) -> list[dict[str, Any]]:
    """Return a row of figures for each scheduler and seed at a rate."""
    workload, _ = workload_of(asked)
    tasks = [task for group in tasks_of(asked, workload) for task in group]
    if rate_qps is not None and not asked.trace:
        synthetic(asked.workload, rate_qps, 2, 0, asked.arrivals)  # says what is wrong with them
    rows: list[dict[str, Any]] = run_all(functools.partial(simulate_row, rate_qps), tasks)
    return rows


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def simulate_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of `simulate` as a table."""
    table = Table(
        title=f"{rows[0]['deployment']}, {rows[0]['workload']}, {rows[0]['rate_qps']:.3g} requests/s"
    )
    table.add_column("scheduler")
    for name in ("gap P50 ms", "P90", "P99", "max", "TTFT mean ms", "P90", "tokens/s", "promises kept"):
        table.add_column(name, justify="right")
    for row in rows:
        gap, ttft = row["gap_ms"], row["ttft_ms"]
        kept = "-" if row["goodput"] is None else f"{row['goodput']:.1%}"
        figures = [*(_number(gap[p]) for p in ("p50", "p90", "p99", "max")), _number(ttft["mean"])]
        figures += [_number(ttft["p90"]), _number(row["output_tokens_per_s"]), kept]
        table.add_row(row["scheduler"], *figures)
    return table


def scheduler_of(row: dict[str, Any]) -> str:
    """Return a row's scheduler as a list names it."""
    name: str = row["scheduler"]
    return name if row["token_budget"] is None else f"{name}@{row['token_budget']}"


def capacity_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of `capacity` as a table."""
    slo = rows[0]["tbt_slo_ms"]
    promise = "no promise" if slo is None else f"P99 gap within {slo:g} ms"
    table = Table(title=f"{rows[0]['deployment']}, {rows[0]['workload']}, {promise}")
    table.add_column("scheduler")
    for name in (
        "requests/s",
        "95% range",
        "gap P99 ms",
        "TTFT P50 ms",
        "P90",
        "all promises kept, requests/s",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        if row["capacity_qps"] is None:
            table.add_row(
                scheduler_of(row), "no rate meets it", "-", "-", "-", "-", _number(row["goodput_qps"], 3)
            )
            continue
        low, high = row["ci_qps"]
        figures = [_number(row["gap_ms"]["p99"]), *(_number(row["ttft_ms"][p]) for p in ("p50", "p90"))]
        table.add_row(
            scheduler_of(row),
            _number(row["capacity_qps"], 3),
            f"{low:.3f} to {high:.3f}",
            *figures,
            _number(row["goodput_qps"], 3),
        )
    return table


def capacity_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows of `capacity` as bars with their ranges."""
    # Imported here: it takes a second, and only pictures need it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained")
    heights = [row["capacity_qps"] or 0.0 for row in rows]
    spread = [
        [max(0.0, (row["capacity_qps"] or 0) - row["ci_qps"][0]) if row["ci_qps"] else 0.0 for row in rows],
        [max(0.0, row["ci_qps"][1] - (row["capacity_qps"] or 0)) if row["ci_qps"] else 0.0 for row in rows],
    ]
    axes.barh([scheduler_of(row) for row in rows], heights, xerr=spread, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("requests per second")
    axes.set_title(f"{rows[0]['deployment']}, {rows[0]['workload']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
