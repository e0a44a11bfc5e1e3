"""`vllm-sarathi trace`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def trace(
    file: Annotated[Path, typer.Argument(help="What `vllm serve --step-trace FILE.jsonl` wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write a timeline that ui.perfetto.dev opens.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the step times against the SLO.")] = None,
) -> None:
    """Summarise a step trace, and turn it into a timeline or a picture."""
    from vllm_sarathi.benchmark.profile.trace import (
        draw_steps,
        read_step_trace,
        trace_table,
        write_perfetto,
    )

    steps = read_step_trace(file)
    Console().print(trace_table(steps))
    if out is not None:
        write_perfetto(steps, out)
    if plot is not None:
        draw_steps(steps, plot)
