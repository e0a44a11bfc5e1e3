"""`vllm-sarathi bench compare`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import FiguresOption


def compare(
    old: Annotated[Path, typer.Argument(help="A result file, or a folder of them.")],
    new: Annotated[Path, typer.Argument(help="Another one, of a later day or release.")],
    json: FiguresOption = None,
) -> None:
    """Compare two sets of results: the ratio of each figure, and its noise where there are repeats."""
    from vllm_sarathi.benchmark.common import compare as benchmark
    from vllm_sarathi.benchmark.common.results import write_rows

    skipped: list[Path] = []
    before, after = (benchmark.read_figures(path, skipped) for path in (old, new))
    rows = benchmark.compare_figures(before, after)
    only_old, only_new = benchmark.alone(before, after), benchmark.alone(after, before)
    console = Console()
    console.print(benchmark.compare_table(rows))
    lines = [*benchmark.alone_lines("OLD", only_old), *benchmark.alone_lines("NEW", only_new)]
    if skipped:
        lines.append(f"skipped, as they hold no results: {benchmark.listed([*map(str, skipped)])}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    write_rows(
        benchmark.to_rows(rows),
        json,
        only_old=[asdict(row) for row in only_old],
        only_new=[asdict(row) for row in only_new],
    )
