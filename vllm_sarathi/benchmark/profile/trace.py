"""Reads a step trace, and shows it: as a timeline for Perfetto, as a picture, and as figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.core.files import write_whole
from vllm_sarathi.core.step_trace import StepTraceError, TracedStep, parse_line, quantile

REASON_COLOURS = {"slo": "#1f5fa8", "all": "#2ca02c", "none": "#909090", "idle": "#c8b4e0"}
OTHER_COLOUR = "#e08214"
MISSED_COLOUR = "#d62728"


def read_step_trace(path: Path) -> list[TracedStep]:
    """Return the steps in a trace; a last line that is still being written is passed over.

    Raises:
        StepTraceError: the file cannot be read, holds no step, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise StepTraceError(f"{path}: cannot be read ({reason}).") from error
    steps = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            steps.append(parse_line(line))
        except ValueError as error:
            raise StepTraceError(f"{path}, line {number}: {error}.") from error
    if not steps:
        raise StepTraceError(f"{path}: holds no step.")
    return steps


def to_perfetto(steps: Sequence[TracedStep]) -> dict[str, Any]:
    """Return the steps in the Trace Event Format, which Perfetto and chrome://tracing open.

    Each step is a slice on one track; the budget, the requests and the time between tokens are counters.
    """
    start_s = min(step.at_s - step.measured_s for step in steps)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "vllm-sarathi"}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "steps"}},
    ]
    for step in steps:
        end_us = (step.at_s - start_s) * 1e6
        begin_us = end_us - step.measured_s * 1e6
        common = {"pid": 1, "tid": 1}
        events.append({"ph": "X", "ts": begin_us, "dur": end_us - begin_us, **common, **_slice(step)})
        if step.slo_s is not None and step.shape.decodes and step.measured_s > step.slo_s:
            events.append({"ph": "i", "s": "t", "ts": end_us, "name": "gap above the SLO", **common})
        counters = {
            "budget": {"tokens": step.token_budget},
            "requests": {"running": step.running, "waiting": step.waiting},
            "step": {"ms": step.measured_s * 1e3},
        }
        for name, args in counters.items():
            events.append({"ph": "C", "ts": begin_us, "pid": 1, "name": name, "args": args})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _slice(step: TracedStep) -> dict[str, Any]:
    shape = step.shape
    prefill_tokens = shape.tokens - shape.decodes
    parts = [f"{shape.decodes} decodes"] if shape.decodes else []
    parts += [f"{prefill_tokens} prefill tokens"] if shape.prefill_work > 0 else []
    return {
        "name": " + ".join(parts) or "empty",
        "cat": step.reason,
        "args": {
            "reason": step.reason,
            "token budget": step.token_budget,
            "tokens": shape.tokens,
            "KV tokens read by decodes": shape.decode_context_tokens,
            "prefill work": shape.prefill_work,
            "predicted ms": None if step.predicted_s is None else step.predicted_s * 1e3,
            "measured ms": step.measured_s * 1e3,
            "SLO ms": None if step.slo_s is None else step.slo_s * 1e3,
        },
    }


def trace_table(steps: Sequence[TracedStep]) -> Table:
    """Return what the steps of each kind came to: how many, how long, within the SLO, and the model's error."""
    kinds = {
        "decodes alone": [s for s in steps if s.shape.decodes and s.shape.prefill_work == 0],
        "hybrid": [s for s in steps if s.hybrid],
        "prefill alone": [s for s in steps if not s.shape.decodes],
    }
    table = Table(title=f"{len(steps)} steps in {steps[-1].at_s - steps[0].at_s:.0f} s")
    table.add_column("steps of")
    for name in ("steps", "ms, P50", "ms, P99", "in the SLO", "error, P50", "P90"):
        table.add_column(name, justify="right")
    for name, chosen in kinds.items():
        if not chosen:
            continue
        times_ms = [step.measured_s * 1e3 for step in chosen]
        with_slo = [s for s in chosen if s.slo_s is not None and s.shape.decodes]
        kept = sum(s.measured_s <= s.slo_s for s in with_slo if s.slo_s is not None)
        table.add_row(
            name,
            str(len(chosen)),
            f"{quantile(times_ms, 0.5):.1f}",
            f"{quantile(times_ms, 0.99):.1f}",
            f"{kept / len(with_slo):.2%}" if with_slo else "-",
            *error_quantiles(chosen),
        )
    return table


def error_quantiles(steps: Sequence[TracedStep]) -> tuple[str, str]:
    """Return the median and P90 of |predicted - measured| / measured, as a reader wants them."""
    errors = [e for step in steps if (e := step.relative_error) is not None]
    return (f"{quantile(errors, 0.5):.1%}", f"{quantile(errors, 0.9):.1%}") if errors else ("-", "-")


def draw_steps(steps: Sequence[TracedStep], out: Path) -> None:
    """Save a picture of the steps: their times against the SLO above, their budgets below."""
    # Imported here: it takes a second, and the timeline does without it.
    from matplotlib.figure import Figure

    start_s = steps[0].at_s
    figure = Figure(figsize=(12, 6.5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    groups: dict[tuple[str, str], list[TracedStep]] = {}
    for step in steps:
        missed = bool(step.slo_s is not None and step.shape.decodes and step.measured_s > step.slo_s)
        colour = MISSED_COLOUR if missed else REASON_COLOURS.get(step.reason, OTHER_COLOUR)
        groups.setdefault(("above the SLO" if missed else step.reason, colour), []).append(step)
    for (name, colour), group in groups.items():
        at_s = [step.at_s - start_s for step in group]
        label = f"{name}: {len(group)}"
        above.plot(at_s, [s.measured_s * 1e3 for s in group], ".", color=colour, markersize=4, label=label)
        below.plot(at_s, [s.token_budget for s in group], ".", color=colour, markersize=3)
    with_slo = [step for step in steps if step.slo_s is not None]
    above.plot(
        [step.at_s - start_s for step in with_slo],
        [(step.slo_s or 0) * 1e3 for step in with_slo],
        color="black",
        linewidth=1,
        label="SLO for the time between tokens",
    )
    above.set_ylabel("step, ms")
    above.set_yscale("log")
    above.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    below.set_ylabel("token budget")
    below.set_xlabel("seconds")
    for panel in (above, below):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def write_perfetto(steps: Sequence[TracedStep], out: Path) -> None:
    """Save the timeline of `to_perfetto`.

    Raises:
        OSError: the file cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(to_perfetto(steps)), lasting=False)
