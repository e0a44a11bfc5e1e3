"""The `autolrs` command: a thin door to the rooms behind it.

Every room is imported where its command runs: looking at a run needs no torch, and `--help` nothing at all.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autolrs_plugin import __version__
from autolrs_plugin.benchmark.command import bench, bench_find, bench_overhead, bench_parallel, paper
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.files import written_whole

if TYPE_CHECKING:
    from autolrs_plugin.core.finding import Finding

app = typer.Typer(help="Finds the learning rate while training.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="The run's folder: its run_dir.", metavar="RUN")]


@app.callback()
def autolrs() -> None:
    """Finds the learning rate while training."""


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


@app.command()
def show(run: Run) -> None:
    """Print what a run has done: its searches, candidates, forecasts and costs; also while it is going on."""
    with _clear_errors():
        from autolrs_plugin.report import load_run, run_tables

        Console().print(run_tables(load_run(run)))


@app.command()
def plot(run: Run, out: Annotated[Path, typer.Option("-o", "--out", help="The picture to write.")]) -> None:
    """Draw a run: learning rate and loss over the steps, with the probes as branches."""
    with _clear_errors():
        from autolrs_plugin.report import draw_run, load_run

        _check_file(out)
        draw_run(load_run(run), out)
        typer.echo(f"the picture is in {out}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON file to write.")],
    fields: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file for learning_rate, lr_scheduler_type, warmup_ratio and min_lr_ratio, too."
        ),
    ] = None,
) -> None:
    """Write a run's schedule, to be replayed: ReplayLR(optimizer, Schedule.load(FILE).lrs) is a torch scheduler."""
    with _clear_errors():
        from autolrs_plugin.core.journal import FILE_NAME, Journal
        from autolrs_plugin.core.replay import recorded
        from autolrs_plugin.core.schedule import Schedule

        state = recorded(Journal.read(run / FILE_NAME))
        _check_file(out)
        if fields is not None:
            _check_file(fields)
        if not state.lrs:
            raise ConfigError(f"{run}: has taken no training step yet, so there is no schedule to export.")
        out.parent.mkdir(parents=True, exist_ok=True)
        Schedule(tuple(state.lrs)).save(out)
        missing = "" if state.step == state.config.max_steps else f" of {state.config.max_steps}, so far"
        typer.echo(f"the schedule of {state.step} steps{missing} is in {out}")
        if fields is not None:
            from autolrs_plugin.core.export import to_fields

            closest = to_fields(state.lrs)
            with written_whole(fields, lasting=False) as scratch:
                scratch.write_text(json.dumps(closest.settings()) + "\n", encoding="utf-8")
            typer.echo(f"{closest.deviation()}; they are in {fields}")


@app.command()
def find(
    target: Annotated[Path, typer.Argument(help="A script that trains with AutoLRS, or a run's folder.")],
    share: Annotated[float, typer.Option(help="Steps that it may take, as a fraction of the run's.")] = 0.03,
) -> None:
    """Print a learning rate with its interval. A script is run up to its training, and nothing is trained.

    Exit code 0 with a rate to rely on, 1 where nothing can be said.
    """
    with _clear_errors():
        found = _found_by_run(target) if target.is_dir() else _found_by_script(target, share)
    typer.echo(str(found))
    raise typer.Exit(0 if found.confident else 1)


def _found_by_run(run: Path) -> "Finding":
    from autolrs_plugin.core.finding import finding
    from autolrs_plugin.report import load_run

    return finding(load_run(run).state)


def _found_by_script(script: Path, share: float) -> "Finding":
    import runpy
    import sys

    from autolrs_plugin.integrations.torch_loop import FoundError, finding_only

    if not script.is_file():
        raise ConfigError(f"{str(script)!r}: is neither a script nor the folder of a run.")
    # As `python SCRIPT` does: its neighbours can be imported.
    sys.path.insert(0, str(script.parent))
    try:
        with finding_only(share):
            runpy.run_path(str(script), run_name="__main__")
    except FoundError as found:
        return found.finding
    finally:
        sys.path.remove(str(script.parent))
    raise ConfigError(f"{str(script)!r}: has come to its end without AutoLRS.run() or next_action().")


@app.command()
def preview(
    max_steps: Annotated[int, typer.Option(help="Training steps of the run itself.")],
    lr_range: Annotated[str, typer.Option(help="The least and the greatest learning rate to try: 1e-5,1.")],
    search_budget: Annotated[
        float, typer.Option(help="Steps that the search may take, as a fraction of --max-steps.")
    ] = 0.2,
    mode: Annotated[str, typer.Option(help="staged, once, or paper: AutoLRS as published.")] = "staged",
    warmup: Annotated[float, typer.Option(help="The warm-up, as a fraction of --max-steps.")] = 0.05,
    final_decay: Annotated[bool, typer.Option(help="Whether the run ends with a decay to zero.")] = True,
    validation: Annotated[bool, typer.Option(help="Whether the run has a validation loss.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything that the search draws.")] = 0,
    best_lr: Annotated[
        float | None,
        typer.Option(help="The stand-in's best learning rate; the middle of the range, if not given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Draw it, too: a picture as that of `autolrs plot`.")
    ] = None,
) -> None:
    """Show what a run with these settings would do, without training: probes, steps of each phase, their share.

    The plan is played on a stand-in job (a quadratic with gradient noise), so the steps are those of a real run,
    up to probes that end early; the losses are the stand-in's.
    """
    with _clear_errors():
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
            _check_file(out)
            draw_run(played.controller, out)
            typer.echo(f"the picture is in {out}")


def _check_file(path: Path) -> None:
    """Raise ConfigError if a file cannot be written there, because it is a folder."""
    if path.is_dir():
        raise ConfigError(f"{str(path)!r}: is a folder; give a file in it.")


def _numbers(text: str) -> list[float]:
    """Return "1e-5,1" as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"lr_range={text!r}: must be two numbers with a comma, such as 1e-5,1.") from None


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can cause into a sentence and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        _exit(f"this command needs {error.name}, which is not installed: pip install 'vllm-sarathi[autolrs]'")
    except (ConfigError, RuntimeError, OSError) as error:
        _exit(str(error))


def _exit(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


app.command()(bench)
app.command()(paper)
app.command()(bench_find)
app.command("bench-parallel")(bench_parallel)
app.command()(bench_overhead)


def main() -> None:
    """Entry point of the `autolrs` command."""
    app()
