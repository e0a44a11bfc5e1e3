"""The benchmarks: `autolrs bench`, `bench-find`, `bench-parallel`, `bench-overhead` and `paper`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autolrs_plugin.cli.options import no_folder

if TYPE_CHECKING:  # torch takes seconds to import: see the commands
    from autolrs_plugin.benchmark.runner import Options

BENCH_OUT = Path("build/autolrs-bench")

TaskOption = Annotated[str, typer.Option(help="Comma-separated tasks, 'all', 'design' or 'judging'.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Number of seeds, from 0 on.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="One seed, and a quarter of the steps.")]


@contextmanager
def _missing_parts_said() -> Iterator[Console]:
    """Give a console, and turn a missing package or folder of the benchmark into a sentence and exit code 2."""
    try:
        yield Console()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def bench(
    task: TaskOption,
    json: Annotated[Path, typer.Option(help="Where the rows go.", callback=no_folder)],
    methods: Annotated[str, typer.Option(help="Comma-separated methods; default: all.")] = "",
    seeds: SeedsOption = 1,
    quick: QuickOption = False,
    out: Annotated[
        Path, typer.Option(help="Folder for results, from which an interrupted benchmark resumes.")
    ] = BENCH_OUT,
) -> None:
    """Compare AutoLRS with other ways to find a learning rate, each given the same compute."""
    # torch and the peers take seconds to import, and the other commands need none of them.
    from autolrs_plugin.benchmark.runner import METHODS, run_bench

    chosen = _names("--methods", methods, list(METHODS)) if methods else list(METHODS)
    options = _options(task, chosen, seeds, quick, out, json)
    with _missing_parts_said() as console:
        run_bench(options, console)


def paper(
    out: Annotated[Path, typer.Option(help="Folder for paper.md, paper.csv and paper.png.")] = Path(
        "build/autolrs-paper"
    ),
    seeds: SeedsOption = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the steps.")] = False,
) -> None:
    """Repeat the paper's comparison at small scale.

    The table has the steps to the final loss of a hand-made schedule, with and without the search's own steps.
    """
    # torch takes seconds to import, and the other commands do not need it.
    from autolrs_plugin.benchmark.paper import run_paper

    with _missing_parts_said() as console:
        run_paper(out, seeds, quick, console)


def bench_find(
    json: Annotated[Path, typer.Option(help="Where the findings go.", callback=no_folder)],
    task: TaskOption = "all",
    shares: Annotated[
        str, typer.Option(help="Steps that find() may take, as comma-separated fractions of the run's.")
    ] = "0.03,0.1",
    seeds: SeedsOption = 5,
    quick: QuickOption = False,
    out: Annotated[Path, typer.Option(help="Folder for the oracle's results, as in `bench`.")] = BENCH_OUT,
) -> None:
    """Compare the rate that `find()` gives with the oracle's: how often the two are within a factor of 3."""
    # torch takes seconds to import, and the other commands do not need it.
    from autolrs_plugin.benchmark.finding import run_finding

    options = _options(task, ["oracle"], seeds, quick, out, json)
    try:
        parts = [float(part) for part in shares.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(0 < part <= 1 for part in parts):
        raise typer.BadParameter(
            f"--shares {shares!r}: must be fractions above 0 and at most 1, with commas."
        )
    with _missing_parts_said() as console:
        run_finding(options, parts, console)


def bench_parallel(
    task: Annotated[str, typer.Option(help="A reference task.")] = "stdlib-gpt",
    steps: Annotated[int, typer.Option(min=100, help="Training steps of the run.")] = 1600,
    actors: Annotated[int, typer.Option(min=1, help="Ray actors in the measured part.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Searches of each kind, alternating.")] = 3,
    workers: Annotated[
        str, typer.Option(help="Numbers of workers in the simulated part, comma-separated.")
    ] = "1,2,10",
    json: Annotated[Path | None, typer.Option(help="Where the figures go.", callback=no_folder)] = None,
) -> None:
    """Measure what probing in parallel saves with Ray actors here, and simulate a cluster."""
    # torch and Ray take seconds to import, and the other commands need neither.
    from autolrs_plugin.benchmark.parallel import bench_parallel as run_parallel
    from autolrs_plugin.benchmark.tasks import TASKS

    (name,) = _names("--task", task, list(TASKS))[:1]
    counts = [int(part) for part in workers.split(",") if part.strip().isdigit()]
    if not counts or min(counts) < 1 or len(counts) != len(workers.split(",")):
        raise typer.BadParameter(f"--workers {workers!r}: must be whole numbers of at least 1, with commas.")
    with _missing_parts_said() as console:
        run_parallel(name, steps, actors, repeats, counts, json, console)


def bench_overhead(
    adapters: Annotated[str, typer.Option(help="Comma-separated adapters; default: all.")] = "",
    steps: Annotated[int, typer.Option(min=20, help="Steps of a run.")] = 300,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each adapter, whose median is reported.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Where the rows go.", callback=no_folder)] = None,
) -> None:
    """Measure what an adapter adds to a framework's steps outside of searches."""
    # torch and the frameworks take seconds to import.
    from autolrs_plugin.benchmark.adapter_overhead import ADAPTERS, median_of, overhead_table, rows_of
    from autolrs_plugin.benchmark.results import write_rows

    chosen = _names("--adapters", adapters, list(ADAPTERS)) if adapters else list(ADAPTERS)
    with _missing_parts_said() as console:
        measured = [median_of(name, steps, runs) for name in chosen]
        console.print(overhead_table(measured))
        if json is not None:
            write_rows(rows_of(measured), json)


def _options(task: str, methods: Sequence[str], seeds: int, quick: bool, out: Path, json: Path) -> "Options":
    """Return what is to be run, with the tasks that `--task` names.

    Raises:
        typer.BadParameter: a task is unknown.
    """
    # As in the commands.
    from autolrs_plugin.benchmark.runner import Options
    from autolrs_plugin.benchmark.tasks import TASKS

    names = [n for n in TASKS if task in ("all", TASKS[n].role)] or _names("--task", task, list(TASKS))
    if quick:
        seeds, out = 1, out / "quick"
    return Options(tuple(TASKS[name] for name in names), tuple(methods), seeds, quick, out, json)


def _names(option: str, text: str, valid: list[str]) -> list[str]:
    """Return the names in a comma-separated list, each once.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in valid]
    if unknown or not names:
        raise typer.BadParameter(
            f"{option} {text!r}: {', '.join(unknown) or 'nothing'} is unknown; valid: {', '.join(valid)}"
        )
    return names
