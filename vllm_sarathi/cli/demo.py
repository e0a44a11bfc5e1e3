"""`vllm-sarathi demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.core.config import SarathiConfig


def demo(
    model: Annotated[str, typer.Option(help="A folder with a chat model, or its name on a model hub.")],
    out: Annotated[Path, typer.Option(help="Where the picture and the figures go.")] = Path("build/demo"),
    token_budget: Annotated[
        int,
        typer.Option(help="Sarathi's token budget, decodes included. The default suits two CPU cores."),
    ] = 80,
) -> None:
    """Serve a model with vLLM's scheduler and with Sarathi, play the same scenario against both, and compare."""
    from vllm_sarathi.benchmark.live.demo import run_demo

    SarathiConfig(token_budget=token_budget)  # said now rather than by the second server, a minute later
    run_demo(model, out, token_budget, Console())
