"""`vllm-sarathi bench overhead`."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.options import FiguresOption
from vllm_sarathi.core.config import SarathiConfig


def overhead(
    running: Annotated[int, typer.Option(help="Running requests.")] = 256,
    waiting: Annotated[int, typer.Option(help="Waiting requests.")] = 64,
    prefill_order: Annotated[str, typer.Option(help="As in `vllm serve`.")] = "fcfs",
    slo_classes: Annotated[str | None, typer.Option(help="As in `vllm serve`.")] = None,
    json: FiguresOption = None,
) -> None:
    """Measure what this scheduler adds to the time of vLLM's own schedule()."""
    from vllm_sarathi.benchmark.common.results import write_rows
    from vllm_sarathi.benchmark.profile.overhead import measure_overhead, overhead_table
    from vllm_sarathi.core.config import check_int

    check_int("running", running, minimum=2)
    check_int("waiting", waiting, minimum=0)
    settings = {"prefill_order": prefill_order, "slo_classes": slo_classes}
    result = measure_overhead(SarathiConfig.from_mapping(settings), running, waiting)
    Console().print(overhead_table(result))
    asked = {"prefill_order": prefill_order, "classes": slo_classes is not None}
    write_rows([{**asked, **asdict(result)}], json)
