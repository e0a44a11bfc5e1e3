"""`vllm-sarathi profile`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def profile(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A folder with a model, or its name on a model hub.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("build/profile"),
    calibration_dir: Annotated[
        str | None, typer.Option(help="As in `vllm serve`; 'none' keeps nothing.")
    ] = None,
) -> None:
    """Measure ahead of time how long steps take, and keep it for `vllm serve` with the same options.

    Any other option is one of `vllm serve`: --dtype, --max-model-len, --tensor-parallel-size and so on.
    """
    from rich.progress import Progress

    from vllm_sarathi.benchmark.profile.device import draw_profile, profile_model, profile_table

    console = Console()
    with Progress(console=console) as progress:
        result = profile_model(model, context.args, calibration_dir, progress)
    console.print(profile_table(result))
    draw_profile(result, out / "profile.png")
    console.print(f"predicted against measured: {out / 'profile.png'}")
