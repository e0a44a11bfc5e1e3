"""What `vllm-sarathi simulate` and `vllm-sarathi capacity` do: read what was asked, run it, show tables and plots."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.capacity.search import (
    Criterion,
    Found,
    RequestSource,
    Task,
    check_search,
    find,
    row_of,
    scheduler_fields,
    simulate_task,
)
from vllm_sarathi.core.config import BASELINES, STOCK_SCHEDULER, ConfigError, check_choice
from vllm_sarathi.core.spec import SchedulerSpec
from vllm_sarathi.simulation.deployment import check_some, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.disturbed import UNDISTURBED, Disturbance
from vllm_sarathi.simulation.placement import Deployment
from vllm_sarathi.simulation.traces import DEFAULT_FORMAT, TOO_LONG, check_no_trace, read_trace
from vllm_sarathi.simulation.workloads.registry import named
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

GOODPUT_SHARE = 0.99
"""The share of the requests with SLOs of their own that have to meet them."""


@dataclass(frozen=True)
class Asked:
    """What the command line asked for.

    Attributes:
        deployment: by name.
        workload: by name; the trace's file name where there is a trace.
        schedulers: names, each with or without `@N`.
        tbt_slo_ms: the SLO; None for none.
        requests: how many.
        seeds: how many.
        arrivals: how a synthetic workload's requests come.
        max_delay_s: the longest median queueing delay, seconds.
        trace, trace_format, time_scale: as `read_trace` takes them.
        too_long: what becomes of requests beyond the model's context, `refuse` or `skip`.
        settings: of SarathiConfig, for `sarathi` without a fixed budget.
        calibration_dir: as `deployment` takes it.
        disturbance: what disturbs the device.
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
    trace_format: str = DEFAULT_FORMAT
    too_long: str = "refuse"
    time_scale: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()
    calibration_dir: str | None = None
    disturbance: Disturbance = UNDISTURBED

    @property
    def place(self) -> Deployment:
        """The deployment."""
        return deployment(self.deployment, self.calibration_dir)

    @property
    def criterion(self) -> Criterion:
        """When a run counts as carried."""
        mode = str(dict(self.settings).get("tbt_mode", "gap"))
        return Criterion(self.tbt_slo_ms, max_delay_s=self.max_delay_s, tbt_mode=mode)

    def scheduler_settings(self, scheduler: str) -> tuple[tuple[str, Any], ...]:
        """Return the settings of one of the schedulers; baselines and fixed budgets take no SLO."""
        spec = SchedulerSpec.parse(scheduler)
        if spec.name == STOCK_SCHEDULER or spec.name in BASELINES:
            return ()
        fixed = spec.token_budget is not None or self.tbt_slo_ms is None
        return (*(() if fixed else (("tbt_slo_ms", self.tbt_slo_ms),)), *self.settings)


def check_asked(asked: Asked) -> None:
    """Check everything before the first run.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    longest = asked.place.max_tokens
    check_search(asked.requests, asked.seeds, asked.criterion)
    check_some(asked.schedulers)
    for name in asked.schedulers:
        choice = scheduler_choice(name, **dict(asked.scheduler_settings(name)))
        if choice.config is not None and (choice.config.token_budget or 0) > longest:
            raise ConfigError(f"--schedulers {name!r}: a step there takes at most {longest} tokens.")
    if asked.trace is None:
        check_no_trace(asked.trace_format, asked.time_scale)
        named(asked.workload)
    check_choice("arrivals", asked.arrivals, ("poisson", "gamma", "fixed"))
    check_choice("too_long", asked.too_long, TOO_LONG)


def check_fit(workload: str, requests: Sequence[SimulatedRequest], max_tokens: int) -> None:
    """Refuse a synthetic workload with requests that are longer than the model's context.

    Raises:
        ConfigError: there are such.
    """
    lengths = [request.prompt_tokens + request.output_tokens for request in requests]
    if longer := sum(each > max_tokens for each in lengths):
        raise ConfigError(
            f"--workload {workload}: {longer} of {len(lengths)} requests are longer than the model's {max_tokens} "
            f"tokens, the longest has {max(lengths)}; --too-long skip leaves such requests out."
        )


def workload_of(asked: Asked) -> tuple[RequestSource, int]:
    """Return the workload, and how many requests were too long for the model and left out.

    Raises:
        ConfigError: there are such, and they are not to be left out; or the trace cannot be read.
    """
    longest = asked.place.max_tokens
    if asked.trace is not None:
        trace = read_trace(asked.trace, asked.trace_format, longest, asked.too_long, asked.time_scale)
        wanted = trace.requests[: asked.requests * asked.seeds]
        return RequestSource(asked.trace.name, asked.requests, trace=wanted), trace.skipped
    whole = RequestSource(asked.workload, asked.requests, asked.arrivals)
    fitting = replace(whole, max_tokens=longest)
    sent = [(whole.at(1.0, seed), fitting.at(1.0, seed)) for seed in range(asked.seeds)]
    skipped = sum(len(every) - len(kept) for every, kept in sent)
    if asked.too_long == "refuse":
        check_fit(asked.workload, [request for every, _ in sent for request in every], longest)
    if any(len(kept) < 2 for _, kept in sent):
        raise ConfigError(
            f"--workload {asked.workload}: no two requests fit into the model's {longest} tokens."
        )
    return fitting, skipped


def tasks_of(asked: Asked, workload: RequestSource) -> list[list[Task]]:
    """Return for each scheduler its searches, one for each seed."""
    return [
        [
            Task(
                asked.deployment,
                name,
                workload,
                asked.criterion,
                seed,
                asked.scheduler_settings(name),
                asked.calibration_dir,
                disturbance=asked.disturbance,
            )
            for seed in range(asked.seeds)
        ]
        for name in asked.schedulers
    ]


def goodput_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Return the searches by the second criterion; none where no request carries an SLO of its own."""
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


def rate_of(requests: Sequence[SimulatedRequest]) -> float | None:
    """Return how many requests arrive per second; None where all come at once."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    return (len(requests) - 1) / span_s if span_s > 0 else None


AT_ONCE = "all requests at once"
"""What a title says in place of a rate where there is none."""


def simulate_row(rate_qps: float | None, task: Task) -> dict[str, Any]:
    """Return the figures of one run at a rate; a trace without a rate is played as it is."""
    outcome = simulate_task(task, rate_qps, to_the_end=True)
    assert outcome is not None
    return {
        "deployment": task.deployment,
        "workload": task.workload.name,
        "tbt_slo_ms": task.criterion.tbt_slo_ms,
        **scheduler_fields(task.scheduler),
        "rate_qps": rate_of(task.workload.window(task.seed)) if rate_qps is None else rate_qps,
        "seed": task.seed,
        "source": task.place.source.kind,
        "disturbance": task.disturbance.text,
        **outcome.to_mapping(),
    }


def simulate_rows(
    asked: Asked, workload: RequestSource, rate_qps: float | None, run_all: Any
) -> list[dict[str, Any]]:
    """Return a row of figures for each scheduler and seed at a rate; None plays a trace as it is."""
    tasks = [task for group in tasks_of(asked, workload) for task in group]
    rows: list[dict[str, Any]] = run_all(functools.partial(simulate_row, rate_qps), tasks)
    return rows


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def simulate_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of `simulate` as a table."""
    rates = sorted({f"{row['rate_qps']:.3g}" for row in rows if row["rate_qps"] is not None}, key=float)
    spread = " to ".join(rates[:: max(1, len(rates) - 1)])
    said = f"{spread} requests/s" if spread else AT_ONCE
    table = Table(title=f"{rows[0]['deployment']}, {rows[0]['workload']}, {said}")
    seeds, with_slos = (
        len({row["seed"] for row in rows}) > 1,
        any(row["request_attainment"] is not None for row in rows),
    )
    table.add_column("scheduler", no_wrap=True)
    columns = ["gap P50 ms", "P90", "P99", "max", "TTFT mean ms", "P90", "tokens/s"]
    for name in [*["seed"] * seeds, *columns, *["SLOs met"] * with_slos]:
        table.add_column(name, justify="right")
    for row in rows:
        gap, ttft = row["gap_ms"], row["ttft_ms"]
        figures = [*(_number(gap[p]) for p in ("p50", "p90", "p99", "max")), _number(ttft["mean"])]
        figures += [_number(ttft["p90"]), _number(row["output_tokens_per_s"])]
        kept = "-" if row["request_attainment"] is None else f"{row['request_attainment']:.1%}"
        table.add_row(scheduler_of(row), *[str(row["seed"])] * seeds, *figures, *[kept] * with_slos)
    return table


def scheduler_of(row: dict[str, Any]) -> str:
    """Return a row's scheduler as a list names it."""
    name: str = row["scheduler"]
    return name if row["token_budget"] is None else f"{name}@{row['token_budget']}"


def capacity_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of `capacity` as a table."""
    slo = rows[0]["tbt_slo_ms"]
    criterion = "no SLO" if slo is None else f"P99 gap within {slo:g} ms"
    table = Table(title=f"{rows[0]['deployment']}, {rows[0]['workload']}, {criterion}")
    table.add_column("scheduler")
    with_slos = any(row["goodput_qps"] is not None for row in rows)
    names = ["requests/s", "95% range", "gap P99 ms", "TTFT P50 ms", "P90"]
    for name in [*names, *["SLOs met, requests/s"] * with_slos]:
        table.add_column(name, justify="right")
    for row in rows:
        if row["capacity_qps"] is None:
            rate, spread = "no rate meets it", "-"
        else:
            rate, (low, high) = _number(row["capacity_qps"], 3), row["ci_qps"]
            spread = f"{low:.3f} to {high:.3f}"
        figures = [_number(row["gap_ms"]["p99"]), *(_number(row["ttft_ms"][p]) for p in ("p50", "p90"))]
        table.add_row(
            scheduler_of(row), rate, spread, *figures, *[_number(row["goodput_qps"], 3)] * with_slos
        )
    if any(row["capacity_qps"] is None for row in rows):
        table.caption = "no rate meets it: the figures are those of the lowest rate that was tried"
    return table


def burst_warning(rows: Sequence[dict[str, Any]], asked: Asked) -> str:
    """Return a warning where the requests of a run come at once, so that nobody waits too long; "" where none do."""
    most_qps = max((row["capacity_qps"] or 0.0 for row in rows), default=0.0)
    span_s = asked.requests / most_qps if most_qps else math.inf
    if span_s >= asked.max_delay_s:
        return ""
    return (
        f"warning: at {most_qps:.3g} requests/s, the {asked.requests} requests of a run come within {span_s:.2g} s, "
        f"less than the delay of {asked.max_delay_s:g} s that may pass: the rate is that of a burst; for a lasting "
        "one, raise --requests."
    )


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
