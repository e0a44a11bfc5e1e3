"""`autolrs export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from autolrs_plugin.cli.options import Run, check_file
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.files import written_whole


def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON file to write.")],
    fields: Annotated[
        Path | None,
        typer.Option(
            help="Also write learning_rate, lr_scheduler_type, warmup_ratio and min_lr_ratio to this JSON file."
        ),
    ] = None,
) -> None:
    """Write a run's schedule, to be replayed: ReplayLR(optimizer, Schedule.load(FILE).lrs) is a torch scheduler."""
    from autolrs_plugin.core.journal import FILE_NAME, Journal
    from autolrs_plugin.core.replay import recorded
    from autolrs_plugin.core.schedule import Schedule

    state = recorded(Journal.read(run / FILE_NAME))
    check_file(out)
    if fields is not None:
        check_file(fields)
    if not state.lrs:
        raise ConfigError(f"{run}: has taken no training step yet, so there is no schedule to export.")
    Schedule(tuple(state.lrs)).save(out)
    missing = "" if state.step == state.config.max_steps else f" of {state.config.max_steps}, so far"
    typer.echo(f"the schedule of {state.step} steps{missing} is in {out}")
    if fields is not None:
        from autolrs_plugin.core.export import to_fields

        closest = to_fields(state.lrs)
        with written_whole(fields, lasting=False) as scratch:
            scratch.write_text(json.dumps(closest.settings()) + "\n", encoding="utf-8")
        typer.echo(f"the four fields are in {fields}\n{closest.deviation()}")
