"""What a latency SLO gains over a tuned budget on measured devices: `vllm-sarathi bench devices`.

Each row is a deployment, a workload and an SLO, with two questions:

- Capacity (the criterion of Sarathi-Serve, arXiv 2403.02310, section 5): what `sarathi` carries, knowing nothing but
  the SLO, over what the best of seven fixed budgets of stock vLLM carries, all in order of arrival; beside them, what
  other schedulers carry that need no budget.
- Attainment under disturbance: at 0.95 of the capacity, on a device whose steps are noisy, the share of all gaps
  within the SLO and the median time to first token, beside those of that best budget at the same rate.

A third table asks for goodput on a trace with shared prefixes: the rate at which 99% of the requests have their first
token within two seconds and their own P99 gap within 50 ms, deadline order over the best fixed budget in order of
arrival.

Constants of the scheduler are chosen on DESIGN_SEEDS; JUDGING_SEEDS are for reports.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

import vllm_sarathi
from vllm_sarathi.benchmark.capacity.cells import Row, name_of
from vllm_sarathi.benchmark.capacity.search import (
    Criterion,
    RequestSource,
    Task,
    find,
    first_rate,
    simulate_task,
)
from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.devices.disturbed import Disturbance
from vllm_sarathi.simulation.outcome import Outcome

DESIGN_SEEDS, JUDGING_SEEDS = range(100), range(100, 200)

TIGHT_MS = {
    "Qwen/Qwen3-30B-A3B/h100": 30.0,
    "Qwen/Qwen3-32B/h100:tp4": 40.0,
    "meta-llama/Llama-3.1-8B/h100": 25.0,
    "meta-llama/Llama-3.1-70B/h100:fp8tp4": 40.0,
    "openai/gpt-oss-120b/h200": 30.0,
    "Qwen/Qwen3-32B/h200:fp8": 40.0,
    "meta-llama/Llama-3.1-70B/h200:tp8": 40.0,
    "MiniMaxAI/MiniMax-M2.5/b200:tp2": 30.0,
    "Qwen/Qwen3-235B-A22B-FP8/h200:tp4": 50.0,
    "deepseek-ai/DeepSeek-V3/h200:tp8ep": 60.0,
}
"""The deployments, dense and mixtures of experts, in bf16, FP8 and MXFP4, on one device to eight; and what an operator
of each might state for an interactive reader, milliseconds."""

SLO_FACTORS = {"strict": 5.0, "relaxed": 25.0}
"""The paper's two SLOs, as multiples of a decode step of 32 requests at a context of 4,096 (section 5, "SLOs")."""

YARDSTICK = StepShape(32, 32, 32 * 4096, 0.0, 32)

SLOS = ("tight", *SLO_FACTORS)
WORKLOADS = ("chat", "arxiv", "mooncake")

BUDGETS = (512, 1024, 256, 2048, 128, 4096, 8192)
"""Tokens a step; those that are best most often come first, so that the others need but one run to lose."""

CONTENDERS = ("prefill-first", "pressure")
"""Schedulers that need no budget: vLLM as the paper had it, and P-PAS."""

RATE_SHARE = 0.95
"""The share of its capacity at which a disturbed deployment is looked at."""

DISTURBANCES = {
    "noise-5": Disturbance(noise=0.05),
    "noise-2": Disturbance(noise=0.02),
    "noise-10": Disturbance(noise=0.10),
    "pauses": Disturbance(pauses_per_minute=4.0),
    "neighbour": Disturbance(neighbour=1.5),
}

GOODPUT_TBT_MS, GOODPUT_TTFT_MS, GOODPUT_SHARE = 50.0, 2000.0, 0.99
"""The SLOs of the requests of the third table, and the share of requests that has to meet them."""


@dataclass(frozen=True)
class Cell:
    """One row.

    Attributes:
        table: `capacity` or `goodput`.
        deployment, workload: by name.
        slo: one of SLOS.
        requests: in a run.
        seed: of the workload and of the disturbances.
        tolerance: how close searches come, as a share.
        disturbances: names out of DISTURBANCES.
        contenders: names out of CONTENDERS.
        code: a fingerprint of what is measured: another scheduler is another row.
    """

    table: str
    deployment: str
    workload: str
    slo: str
    requests: int
    seed: int
    tolerance: float
    disturbances: tuple[str, ...]
    contenders: tuple[str, ...]
    code: str

    @property
    def name(self) -> str:
        """A name for its file."""
        return name_of(asdict(self))

    @property
    def tbt_slo_ms(self) -> float:
        """The SLO for the time between tokens."""
        if self.table == "goodput":
            return GOODPUT_TBT_MS
        if self.slo == "tight":
            return TIGHT_MS[self.deployment]
        place = deployment(self.deployment)
        return round(SLO_FACTORS[self.slo] * place.times().stage_s(YARDSTICK, 0) * place.stages * 1e3, 1)

    @property
    def task(self) -> Task:
        """What `sarathi` is asked for."""
        slo_ms = self.tbt_slo_ms
        longest = deployment(self.deployment).max_tokens
        return Task(
            self.deployment,
            "sarathi",
            RequestSource(self.workload, self.requests, max_tokens=longest),
            Criterion(slo_ms),
            self.seed,
            (("tbt_slo_ms", slo_ms),),
            tolerance=self.tolerance,
        )


def code_fingerprint() -> str:
    """Return a name for the code that schedules and simulates."""
    root = Path(vllm_sarathi.__file__).parent
    files = sorted(path for room in ("core", "engine", "simulation") for path in (root / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def cells_of(
    deployments: Sequence[str],
    workloads: Sequence[str],
    slos: Sequence[str],
    seeds: Sequence[int],
    requests: int,
    tolerance: float,
    disturbances: Sequence[str],
    contenders: Sequence[str] = (),
) -> list[Cell]:
    """Return all rows: the tightest SLO first, and goodput where the workload shares prefixes.

    Raises:
        ConfigError: a name that is unknown.
    """
    for option, names, known in (
        ("deployments", deployments, TIGHT_MS),
        ("workloads", workloads, WORKLOADS),
        ("slos", slos, SLOS),
        ("disturbances", disturbances, DISTURBANCES),
        ("contenders", contenders, CONTENDERS),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(f"--{option} {name!r}: unknown; {nearest_hint(name, known)}")
    rest = (requests, 0, tolerance, tuple(disturbances), tuple(contenders), code_fingerprint())
    made = [
        Cell("capacity", place, workload, slo, *rest)
        for slo in SLOS
        for workload in workloads
        for place in deployments
        if slo in slos
    ]
    if "mooncake" in workloads:
        made += [Cell("goodput", place, "mooncake", "", *rest) for place in deployments]
    return [replace(cell, seed=seed) for seed in seeds for cell in made]


def measure(cell: Cell) -> Row:
    """Return a cell's row."""
    place = deployment(cell.deployment)
    row = {
        "table": cell.table,
        "deployment": cell.deployment,
        "workload": cell.workload,
        "slo": cell.slo,
        "tbt_slo_ms": cell.tbt_slo_ms,
        "seed": cell.seed,
        "seeds": "design" if cell.seed in DESIGN_SEEDS else "judging",
        "requests": cell.requests,
        "source": place.source.kind,
        "warnings": list(place.source.warnings),
    }
    return row | (_goodput(cell) if cell.table == "goodput" else _capacity(cell))


def _capacity(cell: Cell) -> Row:
    task = cell.task
    budget, fixed_qps = best_fixed(task)
    found = find(task, fixed_qps)
    row = {**_compared(found.qps, budget, fixed_qps), "gap_ms": found.outcome["gap_ms"]}
    row["ttft_ms"] = found.outcome["ttft_ms"]
    row["contenders"] = {
        name: find(replace(task, scheduler=name, settings=()), fixed_qps).qps for name in cell.contenders
    }
    rate_qps = RATE_SHARE * (found.qps or fixed_qps or first_rate(task))
    row["disturbed"] = [_disturbed(task, budget, rate_qps, name) for name in cell.disturbances]
    return row


def _goodput(cell: Cell) -> Row:
    task = cell.task
    task = replace(
        task,
        workload=replace(task.workload, tbt_slo_ms=GOODPUT_TBT_MS, ttft_slo_ms=GOODPUT_TTFT_MS),
        criterion=replace(task.criterion, goodput=GOODPUT_SHARE),
        settings=(*task.settings, ("ttft_slo_ms", GOODPUT_TTFT_MS), ("prefill_order", "deadline")),
    )
    budget, fixed_qps = best_fixed(task)
    return _compared(find(task, fixed_qps).qps, budget, fixed_qps)


def _compared(ours_qps: float | None, budget: int | None, fixed_qps: float | None) -> Row:
    ratio = math.inf if ours_qps and not fixed_qps else (ours_qps or 0.0) / (fixed_qps or 1.0)
    # Where nobody carries anything there is nothing to compare; where only we do, JSON has no number for it.
    known = None if not (ours_qps or fixed_qps) or math.isinf(ratio) else ratio
    return {"sarathi_qps": ours_qps, "fixed_budget": budget, "fixed_qps": fixed_qps, "ratio": known}


def best_fixed(task: Task) -> tuple[int | None, float | None]:
    """Return which of BUDGETS carries most of a task's load under stock vLLM, and how much; None where none does.

    A budget is searched only where it carries more than the best before it: all others take one run.
    """
    best: tuple[int | None, float | None] = (None, None)
    for budget in BUDGETS:
        mine = replace(task, scheduler=f"default@{budget}", settings=())
        qps = best[1]
        if qps is None:
            found = find(mine)
        else:
            better_qps = qps * (1 + task.tolerance)
            outcome = simulate_task(mine, better_qps)
            if outcome is None or not mine.criterion.holds(outcome):
                continue
            found = find(mine, better_qps)
        if found.qps is not None:
            best = (budget, found.qps)
    return best


def _disturbed(task: Task, budget: int | None, rate_qps: float, name: str) -> Row:
    """Return what becomes of `sarathi`, and of the best fixed budget, at a rate on a disturbed device."""
    disturbed = replace(task, disturbance=DISTURBANCES[name])
    row: Row = {"disturbance": name, "rate_qps": rate_qps}
    row["sarathi"] = _attainment(simulate_task(disturbed, rate_qps, to_the_end=True), task)
    fixed = replace(disturbed, scheduler=f"default@{budget or BUDGETS[0]}", settings=())
    row["fixed"] = _attainment(simulate_task(fixed, rate_qps, to_the_end=True), task)
    return row


def _attainment(outcome: Outcome | None, task: Task) -> Row:
    assert outcome is not None, "a run to the end has an outcome"
    assert task.criterion.tbt_slo_ms is not None
    kept = float((outcome.gaps_s * 1e3 <= task.criterion.tbt_slo_ms).mean())
    return {"attainment": kept, "ttft_ms": outcome.to_mapping()["ttft_ms"]}


TITLES = {
    "capacity": "sarathi over the best of seven fixed budgets: requests/s within the SLO",
    "goodput": "deadline order over the best fixed budget: requests/s with 99% of the SLOs met",
}


def gain_table(rows: Sequence[Row], table: str) -> Table:
    """Return the rows of one table, the least gain first."""
    shown = Table(title=TITLES[table])
    for name in ("deployment", "workload", "SLO ms"):
        shown.add_column(name)
    others = list(dict.fromkeys(name for row in rows for name in row.get("contenders", ())))
    for name in ("seed", "sarathi", "best fixed", "its budget", "over it", *others):
        shown.add_column(name, justify="right")
    for row in worst_first([row for row in rows if row["table"] == table]):
        figures = [_rate(row[key]) for key in ("sarathi_qps", "fixed_qps")]
        figures += [str(row["fixed_budget"] or "-"), _rate(row["ratio"])]
        figures += [_rate(row.get("contenders", {}).get(name)) for name in others]
        slo = f"{row['slo']} {row['tbt_slo_ms']:g}".strip()
        shown.add_row(row["deployment"], row["workload"], slo, str(row["seed"]), *figures)
    return shown


def _rate(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3f}"


def disturbed_table(rows: Sequence[Row]) -> Table:
    """Return what became of `sarathi` on disturbed devices, the least share of gaps kept first."""
    shown = Table(title="disturbed, at 0.95 of the capacity of sarathi: gaps within the SLO, and median TTFT")
    for name in ("deployment", "workload", "SLO ms", "disturbance"):
        shown.add_column(name)
    for name in ("sarathi kept", "fixed kept", "sarathi TTFT s", "fixed TTFT s"):
        shown.add_column(name, justify="right")
    runs = [(run["sarathi"]["attainment"], row, run) for row in rows for run in row.get("disturbed", ())]
    for _, row, run in sorted(runs, key=lambda each: each[0]):
        both = [run[who] for who in ("sarathi", "fixed")]
        figures = [f"{one['attainment']:.2%}" for one in both]
        figures += [f"{one['ttft_ms']['p50'] / 1e3:.2f}" for one in both]
        slo = f"{row['slo']} {row['tbt_slo_ms']:g}"
        shown.add_row(row["deployment"], row["workload"], slo, run["disturbance"], *figures)
    return shown


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Return rows with the least gain first; those in which nothing is carried at the end."""
    return sorted(rows, key=lambda row: math.inf if row["ratio"] is None else row["ratio"])


def summary_line(rows: Sequence[Row]) -> str:
    """Return the least and the median gain of the rows of a table, and how many lose, in a sentence."""
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if not ratios:
        return f"no load was carried in any of the {len(rows)} rows"
    below = sum(ratio < 1 for ratio in ratios)
    said = f"{len(rows)} rows: at least {min(ratios):.3f}, median {statistics.median(ratios):.3f}, {below} below 1"
    kept = [run["sarathi"]["attainment"] for row in rows for run in row.get("disturbed", ())]
    return f"{said}; disturbed, at least {min(kept):.2%} of the gaps within the SLO" if kept else said
