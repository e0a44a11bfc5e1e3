"""The paper's evaluation again, in simulation: what is run, and what was published.

Sarathi-Serve (Agrawal et al., OSDI'24, arXiv 2403.02310), section 5: capacity of four deployments on two datasets
under a strict and a relaxed SLO (table 3, figures 10 and 11), the ablation (table 4), the token budget (figures 12
and 14), and tensor- against pipeline-parallel serving (figure 13). Nothing here is fitted to the published figures:
they stand beside ours, with the difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sarathi.benchmark.capacity.cells import name_of, run_cells
from vllm_sarathi.benchmark.capacity.search import (
    Criterion,
    Found,
    RequestSource,
    Task,
    find,
    row_of,
    simulate_task,
)
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.deployment import deployment

DATASETS = {"chat": "openchat_sharegpt4", "arxiv": "arxiv_summarization"}


@dataclass(frozen=True)
class PaperDeployment:
    """A deployment of the paper: its SLOs (table 3) and the budgets that the authors profiled for them.

    Attributes:
        name: as `deployment` takes it.
        slo_ms: strict and relaxed, milliseconds.
        budgets: tokens per step for either.
    """

    name: str
    slo_ms: tuple[float, float]
    budgets: tuple[int, int]


DEPLOYMENTS = (
    PaperDeployment("mistral-7b/a100", (100.0, 500.0), (512, 2048)),
    PaperDeployment("yi-34b/2xa100", (200.0, 1000.0), (512, 2048)),
    PaperDeployment("llama2-70b/8xa40", (1000.0, 5000.0), (512, 1536)),
    PaperDeployment("falcon-180b/8xa100", (1000.0, 5000.0), (512, 2048)),
)

STRICTNESS = ("strict", "relaxed")

PUBLISHED_RATIOS = (
    ("mistral-7b/a100", "prefill-first", 2.6),
    ("yi-34b/2xa100", "prefill-first", 3.7),
    ("yi-34b/2xa100", "orca", 4.0),
    ("llama2-70b/8xa40", "prefill-first", 4.3),
    ("llama2-70b/8xa40", "orca", 6.3),
    ("falcon-180b/8xa100", "prefill-first", 5.6),
)
"""How many times the capacity of vLLM (`prefill-first`) or of Orca Sarathi-Serve carries: the largest that the text
names for each deployment (section 5.1; the abstract has 6.9 for Falcon-180B)."""

PIPELINE, TENSOR = "falcon-180b/8xa100", "falcon-180b/8xa100-tp8"
PUBLISHED_PIPELINE_RATIO = 4.3
"""Capacity of Sarathi-Serve on the pipeline over vLLM on tensor parallelism alone, strict (section 5.3)."""

ABLATION = {"hybrid-only": (0.53, 0.68), "chunked-only@1024": (1.04, 0.17), "sarathi@1024": (0.76, 0.14)}
"""Median time to first token and P99 of the time between tokens, seconds: Yi-34B on two A100, 128 requests of
openchat_sharegpt4, budget 1024 (table 4). The load is not stated there."""
ABLATION_DEPLOYMENT = "yi-34b/2xa100"

OVERHEAD_PROMPTS = (2048, 4096, 8192, 16384)
OVERHEAD_BUDGETS = (512, 1024, 2048)
PUBLISHED_OVERHEAD = {(512, 2048): 1.15, (512, 16384): 1.0, (2048, 2048): 1.0, (2048, 16384): 1.0}
"""Time to read a prompt in chunks over the time to read it whole, by budget and prompt (figure 14, Yi-34B)."""

TRADEOFF_SLOS_MS = (50.0, 100.0, 200.0, 500.0)
TRADEOFF_SCHEDULERS = (
    "sarathi",
    "sarathi@256",
    "sarathi@512",
    "sarathi@1024",
    "sarathi@2048",
    "prefill-first",
)


SWEPT = (*(f"default@{budget}" for budget in (128, 256, 512, 1024, 2048, 4096, 8192)), "pressure")
"""Stock vLLM at seven fixed budgets, and P-PAS: whoever tunes the one or switches on the other is to gain nothing."""


@dataclass(frozen=True)
class Scale:
    """How much is spent.

    Attributes:
        requests: in a run.
        seeds: searches for each row.
        tolerance: as in `Task`.
        tradeoff_slos_ms: SLOs on the token budget's curve.
        sweep: whether SWEPT is measured for each row of the capacity table.
    """

    requests: int
    seeds: int
    tolerance: float
    tradeoff_slos_ms: tuple[float, ...]
    sweep: bool = False


FULL = Scale(1024, 3, 0.02, TRADEOFF_SLOS_MS, sweep=True)
QUICK = Scale(256, 1, 0.06, (50.0, 200.0))


@dataclass(frozen=True)
class Cell:
    """One row of one table.

    Attributes:
        table: `capacity`, `sweep`, `tradeoff`, `parallel` or `ablation`.
        label: what the row is called beside its scheduler: `strict`, `relaxed`, or nothing.
        tasks: its searches, one for each seed; for the ablation, one run at half of what the device can read.
    """

    table: str
    label: str
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """A name for the cell's file, from all that decides its answer."""
        return name_of(self.table, self.label, [asdict(task) for task in self.tasks])


def _cell(
    table: str, label: str, place: str, dataset: str, slo_ms: float, scheduler: str, scale: Scale
) -> Cell:
    settings = (("tbt_slo_ms", slo_ms),) if scheduler == "sarathi" else ()
    workload = RequestSource(dataset, scale.requests)
    tasks = (
        Task(place, scheduler, workload, Criterion(slo_ms), seed, settings, tolerance=scale.tolerance)
        for seed in range(scale.seeds)
    )
    return Cell(table, label, tuple(tasks))


def cells_of(scale: Scale) -> list[Cell]:
    """Return all rows of all tables."""
    cells = []
    for place in DEPLOYMENTS:
        for dataset in DATASETS:
            for label, slo_ms, budget in zip(STRICTNESS, place.slo_ms, place.budgets, strict=True):
                for scheduler in (f"sarathi@{budget}", "sarathi", "default", "prefill-first", "orca"):
                    cells.append(_cell("capacity", label, place.name, dataset, slo_ms, scheduler, scale))
                for scheduler in SWEPT if scale.sweep else ():
                    cells.append(_cell("sweep", label, place.name, dataset, slo_ms, scheduler, scale))
    for slo_ms in scale.tradeoff_slos_ms:
        for scheduler in TRADEOFF_SCHEDULERS:
            cells.append(_cell("tradeoff", "", DEPLOYMENTS[0].name, "chat", slo_ms, scheduler, scale))
    for label, slo_ms, budget in zip(STRICTNESS, DEPLOYMENTS[3].slo_ms, DEPLOYMENTS[3].budgets, strict=True):
        for scheduler in ("prefill-first", f"sarathi@{budget}", "sarathi"):
            cells.append(_cell("parallel", label, TENSOR, "chat", slo_ms, scheduler, scale))
    for scheduler in ABLATION:
        task = Task(ABLATION_DEPLOYMENT, scheduler, RequestSource("chat", 128), Criterion())
        cells.append(Cell("ablation", "", (task,)))
    return cells


def measure(cell: Cell) -> dict[str, Any]:
    """Return a cell's row."""
    first = cell.tasks[0]
    about = {"table": cell.table, "label": cell.label}
    if cell.table != "ablation":
        found: list[Found] = [find(task) for task in cell.tasks]
        return {**about, **row_of(cell.tasks, found)}
    requests = first.workload.at(1.0, 0)
    tokens = sum(request.prompt_tokens for request in requests) / len(requests)
    rate_qps = 0.5 / first.place.prefill_s(tokens)
    outcome = simulate_task(first, rate_qps, to_the_end=True)
    assert outcome is not None
    return {**about, "scheduler": first.scheduler, "rate_qps": rate_qps, **outcome.to_mapping()}


def overhead_rows() -> list[dict[str, Any]]:
    """Return what reading in chunks costs over reading whole, by the device model."""
    times = deployment(ABLATION_DEPLOYMENT).times()
    rows = []
    for budget in OVERHEAD_BUDGETS:
        for prompt in OVERHEAD_PROMPTS:
            chunks = [
                times.stage_s(StepShape(budget, 0, 0, chunk_work(done, budget), 1), done)
                for done in range(0, prompt, budget)
            ]
            whole_s = times.stage_s(StepShape(prompt, 0, 0, chunk_work(0, prompt), 1), 0)
            published = PUBLISHED_OVERHEAD.get((budget, prompt))
            rows.append(
                {
                    "token_budget": budget,
                    "prompt_tokens": prompt,
                    "overhead": sum(chunks) / whole_s,
                    "published": published,
                }
            )
    return rows


def rows_of(
    cells: Sequence[Cell], folder: Path, run_all: Callable[..., list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows of all cells, in their order; see `cells.run_cells`."""
    # The long ones first: at the end no core waits for another.
    return run_cells(cells, measure, folder, run_all, order=lambda cell: -cell.tasks[0].workload.requests)


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each published figure with ours, and by how much they differ."""
    found = {
        (r["table"], r["label"], r["deployment"], r["workload"], r["scheduler"], r["token_budget"]): r[
            "capacity_qps"
        ]
        for r in rows
        if r["table"] != "ablation"
    }
    compared = []
    for place in DEPLOYMENTS:
        for baseline, published in ((b, p) for name, b, p in PUBLISHED_RATIOS if name == place.name):
            for scheduler, budget in (("sarathi", place.budgets[0]), ("sarathi", None)):
                ratio = _ratio(
                    found.get(("capacity", "strict", place.name, "chat", scheduler, budget)),
                    found.get(("capacity", "strict", place.name, "chat", baseline, None)),
                )
                name = scheduler if budget is None else f"{scheduler}@{budget}"
                compared.append(
                    _compared(f"{place.name}, chat, strict: {name} over {baseline}", published, ratio)
                )
    for name, budget in (
        (f"sarathi@{DEPLOYMENTS[3].budgets[0]}", DEPLOYMENTS[3].budgets[0]),
        ("sarathi", None),
    ):
        ratio = _ratio(
            found.get(("capacity", "strict", PIPELINE, "chat", "sarathi", budget)),
            found.get(("parallel", "strict", TENSOR, "chat", "prefill-first", None)),
        )
        what = f"{PIPELINE}, chat, strict: {name} on TP4-PP2 over prefill-first on TP8"
        compared.append(_compared(what, PUBLISHED_PIPELINE_RATIO, ratio))
    for row in rows:
        if row["table"] == "ablation":
            ttft_s, tbt_s = ABLATION[row["scheduler"]]
            what = f"{ABLATION_DEPLOYMENT}, ablation: {row['scheduler']}"
            compared.append(_compared(f"{what}, TTFT P50 s", ttft_s, row["ttft_ms"]["p50"] / 1e3))
            compared.append(_compared(f"{what}, TBT P99 s", tbt_s, row["gap_ms"]["p99"] / 1e3))
    for overhead in overhead_rows():
        if overhead["published"] is not None:
            what = "{token_budget} tokens per chunk, a prompt of {prompt_tokens}: time over whole".format(
                **overhead
            )
            compared.append(_compared(what, overhead["published"], overhead["overhead"]))
    return compared


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _compared(what: str, published: float, measured: float | None) -> dict[str, Any]:
    difference = None if measured is None else measured / published - 1
    return {"figure": what, "published": published, "measured": measured, "difference": difference}
