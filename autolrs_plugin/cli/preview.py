"""`autolrs preview`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from autolrs_plugin.cli.options import check_file
from autolrs_plugin.core.config import SEARCH_BUDGET, AutoLRSConfig, ConfigError


def preview(
    max_steps: Annotated[int, typer.Option(help="Training steps of the run itself.")],
    lr_range: Annotated[
        str, typer.Option(help="The lowest and the highest learning rate to try, such as 1e-5,1.")
    ],
    search_budget: Annotated[
        float, typer.Option(help="Steps that the search may take, as a fraction of --max-steps.")
    ] = SEARCH_BUDGET,
    mode: Annotated[str, typer.Option(help="staged, once, or paper: AutoLRS as published.")] = "staged",
    warmup: Annotated[float, typer.Option(help="The warm-up, as a fraction of --max-steps.")] = 0.05,
    final_decay: Annotated[bool, typer.Option(help="Whether the run ends with a decay to zero.")] = True,
    validation: Annotated[bool, typer.Option(help="Whether the run has a validation loss.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    best_lr: Annotated[
        float | None,
        typer.Option(help="The stand-in's best learning rate; default: the middle of the range."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also draw a picture like that of `autolrs plot`.")
    ] = None,
) -> None:
    """Show what a run with these settings would do, without training: probes, steps of each phase, their share.

    The plan is played on a stand-in job (a quadratic with gradient noise), so the steps are those of a real run,
    up to probes that end early; the losses are the stand-in's.
    """
    from autolrs_plugin.core.preview import preview_run
    from autolrs_plugin.report import draw_run, preview_table

    config = AutoLRSConfig.from_mapping(
        {
            "max_steps": max_steps,
            "lr_range": _numbers(lr_range),
            "search_budget": search_budget,
            "mode": mode,
            "warmup": warmup,
            "final_decay": final_decay,
            "validation": validation,
            "seed": seed,
        },
        origin="preview",
    )
    played = preview_run(config, best_lr)
    Console().print(preview_table(played))
    if out is not None:
        check_file(out)
        draw_run(played.controller, out)
        typer.echo(f"the picture is in {out}")


def _numbers(text: str) -> list[float]:
    """Return "1e-5,1" as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"lr_range={text!r}: must be two numbers with a comma, such as 1e-5,1.") from None
