"""What the rows of the live benchmark say: a table per workload and SLO, and who kept it at what price."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vllm_sarathi.benchmark.live import idle
from vllm_sarathi.benchmark.live.contenders import parse_contender
from vllm_sarathi.benchmark.live.rows import Row
from vllm_sarathi.benchmark.live.scale import AS_WRITTEN, Scale
from vllm_sarathi.simulation.workloads.registry import WORKLOADS

KEPT = 0.99
"""The share of gaps within the SLO that keeps it."""


def print_verdicts(rows: Sequence[Row], console: Console, scale: Scale = AS_WRITTEN) -> None:
    """Print a table for each workload and SLO, with a verdict under it."""
    for workload, tbt_slo_ms in dict.fromkeys((row["workload"], row["tbt_slo_ms"]) for row in rows):
        group = [row for row in rows if (row["workload"], row["tbt_slo_ms"]) == (workload, tbt_slo_ms)]
        console.print(rows_table(workload, tbt_slo_ms, group, scale))
        for line in verdict(workload, group):
            console.print(f"  {line}", highlight=False)


def rows_table(workload: str, tbt_slo_ms: float, group: Sequence[Row], scale: Scale = AS_WRITTEN) -> Table:
    """Return one line per scheduler; the caption says how the workload was scaled."""
    caption = ["gaps in ms, time to first token (TTFT) in s; dim: the SLO was not met"]
    slo = f"SLO {tbt_slo_ms:g} ms between tokens"
    if scale.speeds is not None:
        caption.append(scale.sentence)
        slo += f" ({tbt_slo_ms / scale.times:.3g} on the reference device)"
    summary = WORKLOADS[workload].summary if workload in WORKLOADS else "single long prompts"
    table = Table(
        title=f"{workload} ({summary}): {slo}",
        caption="\n".join(caption),
        box=SIMPLE,
    )
    table.add_column("scheduler", no_wrap=True)
    for heading in ("kept", "gap P50", "P99", "max", "TTFT mean", "P50", "P99", "done"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in group:
        gap_ms, ttft_ms = row["gap_ms"], row["ttft_ms"]
        table.add_row(
            row["scheduler"],
            "-" if row["attainment"] is None else f"{row['attainment']:.2%}",
            *(_number(gap_ms[key], 1, 0) for key in ("p50", "p99", "max")),
            *(_number(ttft_ms[key], 1e-3, 2) for key in ("mean", "p50", "p99")),
            f"{row['completed']}/{row['requests']}",
            style=None if keeps(row) else "dim",
        )
    return table


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def keeps(row: Row) -> bool:
    """True where enough gaps kept the SLO, and every request ran to its end."""
    return bool(
        row["attainment"] is not None and row["attainment"] >= KEPT and row["completed"] == row["requests"]
    )


def verdict(workload: str, group: Sequence[Row]) -> list[str]:
    """Return a sentence for each of ours, against the best of the stock budgets that keep the SLO too."""
    if workload == idle.NAME:
        return _idle_verdict(group)
    stock = [row for row in group if parse_contender(row["scheduler"]).is_stock]
    keeping = [row for row in stock if keeps(row)]
    best = min(keeping, key=lambda row: row["ttft_ms"]["mean"], default=None)
    lines = []
    for row in group:
        if row in stock:
            continue
        attained = (
            "nothing to judge" if row["attainment"] is None else f"{row['attainment']:.2%} of gaps kept"
        )
        line = f"{row['scheduler']}: {'kept' if keeps(row) else 'NOT KEPT'} ({attained})"
        if best is not None and row["ttft_ms"]["mean"] is not None:
            line += (
                f"; mean TTFT {row['ttft_ms']['mean'] / best['ttft_ms']['mean']:.2f} x that of "
                f"{best['scheduler']}, the best of {len(keeping)} stock budgets that keep it"
            )
        elif stock:
            line += f"; none of {len(stock)} stock budgets keeps it"
        lines.append(line)
    return lines


def _idle_verdict(group: Sequence[Row]) -> list[str]:
    medians = {row["scheduler"]: row["ttft_ms"]["p50"] for row in group}
    ours, stock = (medians.get(contender.label) for contender in idle.CONTENDERS)
    if not ours or not stock:
        return []
    return [f"median TTFT of a single long prompt: ours {ours / stock - 1:+.1%} against stock"]
