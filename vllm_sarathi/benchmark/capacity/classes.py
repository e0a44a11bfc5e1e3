"""What SLO classes are worth on measured devices: `vllm-sarathi bench classes`.

Four questions, each asked of one deployment and seed:

- *mixed*: three classes in one stream; the rate at which 99% of the SLOs are kept, over that of the best of seven
  fixed budgets of stock vLLM in order of arrival.
- *beside*: the requests with SLOs of that stream at half of that rate, and batch work without end; how much batch
  work is done, over what the device would have done of it without SLOs: all work that stock vLLM does of the same
  requests at its quickest budget, less the work with SLOs.
- *tenants*: two in one class, one of which floods; the other's P99 of time to first token over what it is alone.
- *refusal*: 1.5 times what is carried, in a class that refuses; the share of the admitted whose SLO is kept, and
  the share of the refused whose SLO a run without refusal does not keep, whether late requests keep their place in
  it or go behind the others.

Constants of the scheduler are chosen on the design seeds; the judging seeds are for reports (`devices_table`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from vllm_sarathi.benchmark.capacity.devices import DESIGN_SEEDS, best_fixed
from vllm_sarathi.benchmark.capacity.search import Criterion, RequestSource, Task, find
from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.outcome import meets_slos
from vllm_sarathi.simulation.simulator import RequestLog, Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

Row = dict[str, Any]

DEPLOYMENT = "meta-llama/Llama-3.1-8B/h100"

KEPT_SHARE = 0.99

THREE: dict[str, Any] = {
    "default": "normal",
    "classes": {
        "interactive": {"ttft_slo_ms": 250, "tbt_slo_ms": 25, "weight": 4, "when_late": "relegate"},
        "normal": {"ttft_slo_ms": 1000, "tbt_slo_ms": 50, "when_late": "relegate"},
        "batch": {"batch": True},
    },
}
"""The classes of the workload `classes`, with what an operator of this device might state as SLOs (`TIGHT_MS`)."""

ONE_TTFT_MS, ONE_TBT_MS = 2000, 25
ONE_CLASS = ("tenants", "refusal")
"""The questions that have one class of requests."""

LIGHT_SHARE, FLOOD_TIMES = 0.2, 2.0
"""Of what the deployment carries: what the tenant that keeps to its share sends, and the one that floods."""

QUICKEST = (2048, 4096, 8192)
"""The budgets out of which the one that does most work is taken."""

BESIDE_SHARE = 0.5
"""The work with SLOs beside which batch work is measured, as a share of what is carried."""

OVERLOAD = 1.5
BATCH_PER_S = 8.0
"""Requests of batch work that are there at once, for each second of a run: more than the device can do."""


@dataclass(frozen=True)
class Cell:
    """One question.

    Attributes:
        question: a name out of QUESTIONS.
        deployment: by name.
        requests: in a run.
        seed: of the workload.
        tolerance: how close searches come, as a share.
        ttft_slo_ms: the SLO for the time to first token where there is one class.
    """

    question: str
    deployment: str
    requests: int
    seed: int
    tolerance: float
    ttft_slo_ms: float = ONE_TTFT_MS


def one_class(when_late: str, ttft_slo_ms: float) -> dict[str, Any]:
    """Return a class file with one class."""
    slos = {"ttft_slo_ms": ttft_slo_ms, "tbt_slo_ms": ONE_TBT_MS, "when_late": when_late}
    return {"default": "chat", "classes": {"chat": slos}}


def ask(cell: Cell) -> Row:
    """Return the answer to a question."""
    row: Row = {"question": cell.question, "deployment": cell.deployment, "requests": cell.requests}
    if cell.question in ONE_CLASS:
        row["ttft_slo_ms"] = cell.ttft_slo_ms
    row |= {"seed": cell.seed, "seeds": "design" if cell.seed in DESIGN_SEEDS else "judging"}
    return row | QUESTIONS[cell.question](cell)


def _task(cell: Cell, workload: RequestSource, classes: dict[str, Any]) -> Task:
    settings = (("slo_classes", classes),)
    criterion = Criterion(goodput=KEPT_SHARE)
    return Task(
        cell.deployment, "sarathi", workload, criterion, cell.seed, settings, tolerance=cell.tolerance
    )


def _mixed_task(cell: Cell) -> Task:
    return _task(
        cell,
        RequestSource("classes", cell.requests, trace=tuple(three_classes(cell.requests, cell.seed))),
        THREE,
    )


def three_classes(count: int, seed: int) -> list[SimulatedRequest]:
    """Return the requests of the workload `classes`, with the SLOs of THREE."""
    slos = {
        name: {k: v for k, v in each.items() if k.endswith("_ms")} for name, each in THREE["classes"].items()
    }
    blank = {"ttft_slo_ms": None, "tbt_slo_ms": None}
    return [replace(r, **{**blank, **slos[r.kind]}) for r in synthetic("classes", 1.0, count, seed)]


def mixed(cell: Cell) -> Row:
    """Compare the rate that is carried with that of the best fixed budget."""
    task = _mixed_task(cell)
    ours_qps = find(task).qps
    budget, fixed_qps = best_fixed(task)
    ratio = None if not ours_qps or not fixed_qps else ours_qps / fixed_qps
    return {"sarathi_qps": ours_qps, "fixed_budget": budget, "fixed_qps": fixed_qps, "ratio": ratio}


def run(
    cell: Cell,
    requests: Sequence[SimulatedRequest],
    classes: dict[str, Any] | None,
    budget: int | None = None,
    done: Callable[[Simulator], bool] | None = None,
) -> list[RequestLog]:
    """Return what clients see of a run: ours with these classes, stock at a budget without.

    Args:
        cell: says which deployment and seed.
        requests: in order of arrival.
        classes: the class file.
        budget: of stock vLLM.
        done: says when to look; None for the end.
    """
    place = deployment(cell.deployment)
    name, settings = (f"default@{budget}", {}) if classes is None else ("sarathi", {"slo_classes": classes})
    scheduler = build(place, scheduler_choice(name, **settings))
    simulator = Simulator(scheduler, place.times(cell.seed), requests, place.in_flight)
    simulator.run(done)
    return simulator.logs


def _all_but(kind: str) -> Callable[[Simulator], bool]:
    """Return what says that all requests but those of a kind, or a tenant, have been answered."""

    def done(simulator: Simulator) -> bool:
        others = [log for log in simulator.logs if kind not in (log.request.kind, log.request.tenant)]
        return all(log.finished for log in others)

    return done


def _work(logs: Sequence[RequestLog], until_s: float) -> int:
    """Return the tokens that were read and written by a time."""
    done = 0
    for log in logs:
        written = sum(time_s <= until_s for time_s in log.token_s)
        done += written + (log.request.prompt_tokens if written else 0)
    return done


def _kept(logs: Sequence[RequestLog]) -> float | None:
    kept = [kept for log in logs if (kept := meets_slos(log)) is not None]
    return sum(kept) / len(kept) if kept else None


def beside(cell: Cell) -> Row:
    """Tell how much batch work is done beside SLOs that are kept."""
    task = _mixed_task(cell)
    qps = find(task).qps
    if qps is None:
        return {"rate_qps": None}
    stream = task.workload.at(BESIDE_SHARE * qps, cell.seed)
    with_slo = [request for request in stream if request.kind != "batch"]
    until_s = with_slo[-1].arrival_s
    endless = three_classes(int(8 * BATCH_PER_S * until_s) + 64, cell.seed + 1000)
    backlog = [replace(r, arrival_s=0.0) for r in endless if r.kind == "batch"]
    requests = sorted([*backlog, *with_slo], key=lambda request: request.arrival_s)
    ours = run(cell, requests, THREE, done=_all_but("batch"))
    batch = [log for log in ours if log.request.kind == "batch"]
    others = [log for log in ours if log.request.kind != "batch"]
    runs = [run(cell, requests, None, budget, lambda now: now.now_s >= until_s) for budget in QUICKEST]
    stock = max(_work(logs, until_s) for logs in runs)
    room = stock - _work(others, until_s)
    done = _work(batch, until_s)
    return {
        "rate_qps": BESIDE_SHARE * qps,
        "kept": _kept(others),
        "batch_tokens_per_s": done / until_s,
        "all_tokens_per_s": (done + _work(others, until_s)) / until_s,
        "without_slos_tokens_per_s": stock / until_s,
        "batch_share": done / room if room > 0 else None,
    }


def _chat_task(cell: Cell, when_late: str) -> Task:
    workload = RequestSource("chat", cell.requests, tbt_slo_ms=ONE_TBT_MS, ttft_slo_ms=cell.ttft_slo_ms)
    return _task(cell, workload, one_class(when_late, cell.ttft_slo_ms))


def tenants(cell: Cell) -> Row:
    """Compare a tenant's times to first token beside one that floods with those alone."""
    task = _chat_task(cell, "relegate")
    qps = find(task).qps
    if qps is None:
        return {"rate_qps": None}
    few = replace(task.workload, requests=max(10, cell.requests // 4))
    light = [replace(r, tenant="light") for r in few.at(LIGHT_SHARE * qps, cell.seed)]
    until_s = light[-1].arrival_s
    count = int(FLOOD_TIMES * qps * until_s)
    flood = synthetic("chat", FLOOD_TIMES * qps, count, cell.seed + 1000)
    flood = [replace(r, tenant="flood", ttft_slo_ms=cell.ttft_slo_ms, tbt_slo_ms=ONE_TBT_MS) for r in flood]
    both = sorted([*light, *flood], key=lambda request: request.arrival_s)
    classes = one_class("relegate", cell.ttft_slo_ms)
    alone_s = _first_tokens_s(run(cell, light, classes), "light")
    beside_s = _first_tokens_s(run(cell, both, classes, done=_all_but("flood")), "light")
    row: Row = {"rate_qps": qps, "light_qps": LIGHT_SHARE * qps, "flood_qps": FLOOD_TIMES * qps}
    for name, times_s in (("alone", alone_s), ("beside", beside_s)):
        row[f"{name}_ttft_ms"] = {f"p{p}": float(np.percentile(times_s, p)) * 1e3 for p in (50, 90, 99)}
    return row | {"ratio": row["beside_ttft_ms"]["p99"] / row["alone_ttft_ms"]["p99"]}


def _first_tokens_s(logs: Sequence[RequestLog], tenant: str) -> list[float]:
    """Return a tenant's times to first token."""
    mine = [log for log in logs if log.request.tenant == tenant]
    return [log.token_s[0] - log.request.arrival_s for log in mine]


def refusal(cell: Cell) -> Row:
    """Judge refusals by runs without."""
    task = _chat_task(cell, "relegate")
    qps = find(task).qps
    if qps is None:
        return {"rate_qps": None}
    requests = task.workload.at(OVERLOAD * qps, cell.seed)
    logs = run(cell, requests, one_class("refuse", cell.ttft_slo_ms))
    refused = [index for index, log in enumerate(logs) if log.refused]
    admitted = [log for log in logs if not log.refused]
    row: Row = {
        "rate_qps": qps,
        "offered_qps": OVERLOAD * qps,
        "refused": len(refused),
        "kept": _kept(admitted),
    }
    row["kept_of_all"] = sum(meets_slos(log) is True for log in logs) / len(logs)
    for when_late in ("serve", "relegate"):
        without = run(cell, requests, one_class(when_late, cell.ttft_slo_ms))
        lost = sum(meets_slos(without[index]) is False for index in refused)
        row[f"rightly_{when_late}"] = lost / len(refused) if refused else None
        row[f"kept_{when_late}"] = _kept(without)
    return row


QUESTIONS: dict[str, Callable[[Cell], Row]] = {
    "mixed": mixed,
    "beside": beside,
    "tenants": tenants,
    "refusal": refusal,
}


def cells_of(
    questions: Sequence[str],
    place: str,
    seeds: Sequence[int],
    requests: int,
    tolerance: float,
    ttft_slo_ms: float = ONE_TTFT_MS,
) -> list[Cell]:
    """Return all questions of all seeds.

    Raises:
        ConfigError: a name that is unknown.
    """
    for name in questions:
        if name not in QUESTIONS:
            raise ConfigError(f"--questions {name!r}: unknown; {nearest_hint(name, QUESTIONS)}")
    return [Cell(name, place, requests, seed, tolerance, ttft_slo_ms) for seed in seeds for name in questions]


FIGURES: dict[str, tuple[str, ...]] = {
    "mixed": ("sarathi_qps", "fixed_qps", "fixed_budget", "ratio"),
    "beside": ("rate_qps", "kept", "batch_tokens_per_s", "without_slos_tokens_per_s", "batch_share"),
    "tenants": ("light_qps", "flood_qps", "alone P99 ms", "beside P99 ms", "ratio"),
    "refusal": ("offered_qps", "refused", "kept", "rightly_serve", "rightly_relegate", "kept_serve"),
}


def question_table(question: str, rows: Sequence[Row]) -> Table:
    """Return the answers to one question, a line per seed."""
    table = Table(title=f"{question}: {QUESTIONS[question].__doc__}")
    for name in ("deployment", "seed", *FIGURES[question]):
        table.add_column(name, justify="right")
    for row in rows:
        if row["question"] != question:
            continue
        figures = []
        for name in FIGURES[question]:
            key, _, percentile = name.partition(" ")
            value = row[f"{key}_ttft_ms"]["p99"] if percentile and row["rate_qps"] else row.get(name)
            figures.append("-" if value is None else f"{value:.4g}")
        table.add_row(row["deployment"], str(row["seed"]), *figures)
    return table
