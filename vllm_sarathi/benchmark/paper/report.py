"""What `vllm-sarathi paper` leaves behind: tables as CSV and Markdown, and plots."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sarathi.benchmark.capacity.simulated import scheduler_of
from vllm_sarathi.benchmark.paper.runs import DATASETS, DEPLOYMENTS, STRICTNESS, comparisons, overhead_rows
from vllm_sarathi.core.files import write_whole

Row = dict[str, Any]

COLUMNS: dict[str, tuple[str, ...]] = {
    "capacity": (
        "deployment",
        "workload",
        "slo",
        "tbt_slo_ms",
        "scheduler",
        "capacity_qps",
        "over_prefill_first",
    ),
    "sweep": (
        "deployment",
        "workload",
        "slo",
        "sarathi_qps",
        "best_budget",
        "best_qps",
        "over_best",
        "worst_qps",
        "pressure_qps",
        "over_pressure",
    ),
    "tradeoff": ("deployment", "workload", "tbt_slo_ms", "scheduler", "capacity_qps"),
    "parallel": ("deployment", "workload", "slo", "tbt_slo_ms", "scheduler", "capacity_qps"),
    "ablation": ("scheduler", "rate_qps", "ttft_p50_s", "tbt_p99_s"),
    "overhead": ("token_budget", "prompt_tokens", "overhead", "published"),
    "published": ("figure", "published", "measured", "difference"),
}
"""The tables, and what stands in each."""

TITLES = {
    "capacity": "Capacity, requests per second (paper: figures 10 and 11)",
    "sweep": "The SLO alone against seven fixed budgets of stock vLLM, and P-PAS",
    "tradeoff": "Capacity by SLO and token budget (figure 12)",
    "parallel": "Falcon-180B: tensor- against pipeline-parallel (figure 13)",
    "ablation": "Ablation, Yi-34B on two A100 (table 4)",
    "overhead": "Prefill in chunks over prefill at once (figure 14)",
    "published": "The published figures beside ours",
}


def tables_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return each table's rows, with the columns of COLUMNS.

    Args:
        rows: those of all cells, as `paper.rows_of` gives them.
    """
    tables: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    least = {_place(r): r["capacity_qps"] for r in rows if r.get("scheduler") == "prefill-first"}
    tables["sweep"] = _sweep(rows)
    for row in rows:
        if row["table"] == "sweep":
            continue
        if row["table"] == "ablation":
            values = {
                **row,
                "ttft_p50_s": row["ttft_ms"]["p50"] / 1e3,
                "tbt_p99_s": row["gap_ms"]["p99"] / 1e3,
            }
        else:
            base = least.get(_place(row))
            values = {
                **row,
                "scheduler": scheduler_of(row),
                "slo": row["label"],
                "over_prefill_first": _over(row["capacity_qps"], base),
            }
        tables[row["table"]].append(values)
    # The pipeline's rows stand in the capacity table already.
    pipeline = [
        r for r in tables["capacity"] if (r["deployment"], r["workload"]) == (DEPLOYMENTS[3].name, "chat")
    ]
    tables["parallel"] += [r for r in pipeline if r["scheduler"] not in ("default", "orca")]
    tables["overhead"] = overhead_rows()
    tables["published"] = comparisons(rows)
    return {
        name: [{key: row[key] for key in COLUMNS[name]} for row in table] for name, table in tables.items()
    }


def _sweep(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each deployment, data set and SLO that was swept."""
    lines = []
    for ours in rows:
        if ours["table"] != "capacity" or scheduler_of(ours) != "sarathi":
            continue
        swept = {
            scheduler_of(r): r["capacity_qps"] or 0.0
            for r in rows
            if r["table"] == "sweep" and _place(r)[1:] == _place(ours)[1:]
        }
        if not swept:
            continue
        pressure, qps = swept.pop("pressure"), ours["capacity_qps"] or 0.0
        best = max(swept, key=swept.__getitem__)
        line = {
            "slo": ours["label"],
            "sarathi_qps": qps,
            "best_budget": best,
            "best_qps": swept[best],
            "over_best": _over(qps, swept[best]),
            "worst_qps": min(swept.values()),
            "pressure_qps": pressure,
            "over_pressure": _over(qps, pressure),
        }
        lines.append({**ours, **line})
    return lines


def _over(qps: float | None, base: float | None) -> float | None:
    """Return a capacity over another; None where one of them is none."""
    return qps / base if base and qps is not None else None


def _place(row: Row) -> tuple[Any, ...]:
    return row["table"], row.get("deployment"), row.get("workload"), row.get("tbt_slo_ms")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none" if key.endswith("_qps") or key.startswith("over_") else "-"
    if key == "difference":
        return f"{value:+.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def texts(name: str, table: Sequence[Row]) -> list[list[str]]:
    """Return a table's rows as they are read."""
    return [[_text(column, row[column]) for column in COLUMNS[name]] for row in table]


def markdown(tables: dict[str, list[Row]], requests: int, seeds: int) -> str:
    """Return the whole report."""
    lines = [
        "# Sarathi-Serve's evaluation, in simulation",
        "",
        f"{requests} requests in a run, {seeds} seed(s). `prefill-first` is vLLM as the paper had it, `default` is "
        "vLLM V1 with its default budget, `sarathi@N` has a fixed budget, `sarathi` is given the SLO alone. "
        "Capacity is the highest rate with P99 of the time between tokens within the SLO and a median "
        "queueing delay of at most 2 s; none: no rate meets it. No constant is fitted to a published figure.",
    ]
    for name, table in tables.items():
        if not table:
            continue
        columns = COLUMNS[name]
        lines += [
            "",
            f"## {TITLES[name]}",
            "",
            "| " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        ]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(row) + " |" for row in texts(name, table)]
    return "\n".join(lines) + "\n"


def write_report(tables: dict[str, list[Row]], folder: Path, requests: int, seeds: int) -> list[Path]:
    """Write `report.md`, a CSV for each table, and the plots; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md"]
    write_whole(written[0], markdown(tables, requests, seeds))
    for name, table in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS[name], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        written.append(folder / f"{name}.csv")
        write_whole(written[-1], text.getvalue())
    return written + _plots(tables, folder)


def _plots(tables: dict[str, list[Row]], folder: Path) -> list[Path]:
    # Imported here: it takes a second, and only pictures need it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(DATASETS), len(DEPLOYMENTS), figsize=(15, 7), layout="constrained", squeeze=False
    )
    for across, place in enumerate(DEPLOYMENTS):
        for down, dataset in enumerate(DATASETS):
            _bars(axes[down][across], place.name, dataset, tables["capacity"])
    axes[0][0].legend(fontsize="small")
    written = [folder / "capacity.png"]
    figure.savefig(written[0], dpi=110)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for scheduler in dict.fromkeys(row["scheduler"] for row in tables["tradeoff"]):
        rows = [r for r in tables["tradeoff"] if r["scheduler"] == scheduler]
        axis.plot(
            [r["tbt_slo_ms"] for r in rows], [r["capacity_qps"] or 0 for r in rows], "o-", label=scheduler
        )
    axis.set(
        xlabel="SLO for the time between tokens, ms",
        ylabel="requests per second",
        xscale="log",
        title="Mistral-7B",
    )
    axis.legend(fontsize="small")
    written.append(folder / "tradeoff.png")
    figure.savefig(written[-1], dpi=110)
    plt.close(figure)
    return written


def _bars(axis: Any, place: str, dataset: str, table: Sequence[Row]) -> None:
    width = 0.16
    by_slo: dict[str, list[Row]] = {
        label: [r for r in table if (r["deployment"], r["workload"], r["slo"]) == (place, dataset, label)]
        for label in STRICTNESS
    }
    names = ("sarathi@tau", "sarathi", "default", "prefill-first", "orca")
    for offset, name in enumerate(names):
        heights = []
        for label in STRICTNESS:
            own = [r for r in by_slo[label] if r["scheduler"].startswith(name.replace("tau", ""))]
            own = [r for r in own if ("@" in r["scheduler"]) == ("@" in name)]
            heights.append((own[0]["capacity_qps"] or 0.0) if own else 0.0)
        axis.bar([i + (offset - 2) * width for i in range(len(STRICTNESS))], heights, width, label=name)
    axis.set_xticks(range(len(STRICTNESS)), STRICTNESS)
    axis.set_title(f"{place}, {dataset}", fontsize="small")
    axis.set_ylabel("requests/s")
