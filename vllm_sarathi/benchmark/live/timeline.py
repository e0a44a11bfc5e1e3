"""The picture of a comparison: one panel per run, a row per stream, a tick per delivery, silences in red."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vllm_sarathi.benchmark.live.streams import StreamRecord

STREAM_COLOUR = "#1f5fa8"
LONG_COLOUR = "#8a8a8a"
SILENCE_COLOUR = "#d62728"

# Beyond this, a reader sees a stream stop.
SILENCE_S = 1.0


def draw_timeline(
    runs: Mapping[str, Sequence[StreamRecord]],
    long_names: frozenset[str],
    out: Path,
    *,
    title: str,
    silence_s: float = SILENCE_S,
) -> None:
    """Save `runs` (panel title -> records) as a picture; the streams in `long_names` had the long prompts.

    Every panel has the same time axis. A gap longer than `silence_s` is a red bar, the longest has its
    length in figures; the wait of a long prompt for its first token is a thin grey line.
    """
    rows = max(len(records) for records in runs.values())
    figure = Figure(figsize=(13, 1.4 + len(runs) * (0.9 + 0.27 * rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, records) in zip(panels, runs.items(), strict=True):
        _draw_run(panel, name, records, long_names, silence_s)
    panels[-1].set_xlabel("seconds since the first request")
    panels[-1].margins(x=0.01)
    panels[-1].set_xlim(left=0)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.legend(handles=_legend(silence_s), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _draw_run(
    panel: Axes, name: str, records: Sequence[StreamRecord], long_names: frozenset[str], silence_s: float
) -> None:
    longest: tuple[float, float, int] | None = None  # length, middle, row
    silences = 0
    for row, record in enumerate(records):
        is_long = record.name in long_names
        times = [delivery.at_s for delivery in record.deliveries]
        panel.plot(
            times, [row] * len(times), "|", markersize=9, color=LONG_COLOUR if is_long else STREAM_COLOUR
        )
        if is_long:
            panel.axvline(record.sent_s, color="black", linestyle=":", linewidth=1, zorder=0)
            panel.plot(record.sent_s, row, ">", color="black", markersize=7)
            panel.hlines(row, record.sent_s, times[0] if times else record.sent_s, LONG_COLOUR, linewidth=1)
        for start, end in itertools.pairwise(times):
            if end - start > silence_s:
                silences += 1
                panel.hlines(row, start, end, SILENCE_COLOUR, linewidth=9, alpha=0.85)
                longest = max(longest or (0.0, 0.0, 0), (end - start, (start + end) / 2, row))
    if longest is not None:
        length, middle, row = longest
        panel.text(
            middle,
            row,
            f"{length:.1f} s",
            color="white",
            fontsize=8,
            fontweight="bold",
            ha="center",
            va="center_baseline",
        )
    panel.set_title(f"{name}: {_silence_count(silences, silence_s)}", loc="left", fontsize=11)
    panel.set_yticks(range(len(records)), [record.name for record in records], fontsize=8)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _silence_count(silences: int, silence_s: float) -> str:
    count = {0: "no stream fell silent", 1: "once a stream fell silent"}.get(
        silences, f"{silences} times a stream fell silent"
    )
    return f"{count} for more than {silence_s:g} s"


def _legend(silence_s: float) -> list[Line2D]:
    def mark(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **style)  # type: ignore[arg-type]  # of many types

    return [
        mark("a token of a running chat", color=STREAM_COLOUR, marker="|", linestyle="none", markersize=10),
        mark(f"a silence of more than {silence_s:g} s", color=SILENCE_COLOUR, linewidth=7),
        mark("a long prompt arrives", color="black", marker=">", linestyle=":", markersize=7),
        mark("it waits, then answers", color=LONG_COLOUR, marker="|", linewidth=1, markersize=10),
    ]
