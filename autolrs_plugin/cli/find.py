"""`autolrs find`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autolrs_plugin.core.config import ConfigError

if TYPE_CHECKING:
    from autolrs_plugin.core.finding import Finding


def find(
    target: Annotated[Path, typer.Argument(help="A script that trains with AutoLRS, or a run's folder.")],
    share: Annotated[
        float | None,
        typer.Option(help="Steps that the search may take, as a fraction of the run's. Default: 0.03."),
    ] = None,
) -> None:
    """Print a learning rate with its interval. A script is run up to its training, and nothing is trained.

    With the default share of 0.03 the run needs at least 3,334 steps (3,667 with a validation loss); with 0.1, 1,000
    (1,100). Nothing is left in the run_dir.

    Exit code 0 with a rate to rely on, 1 without one.
    """
    if target.is_dir() and share is not None:
        raise ConfigError(
            f"--share: {str(target)!r} is the folder of a run, where nothing is searched for; give its script, "
            "or leave --share out."
        )
    found = _found_by_run(target) if target.is_dir() else _found_by_script(target, share)
    typer.echo(str(found))
    raise typer.Exit(0 if found.confident else 1)


def _found_by_run(run: Path) -> "Finding":
    from autolrs_plugin.core.finding import finding
    from autolrs_plugin.report import load_run

    return finding(load_run(run).state)


def _found_by_script(script: Path, share: float | None) -> "Finding":
    import runpy
    import sys

    from autolrs_plugin.integrations.torch_loop import FIND_SHARE, FoundError, finding_only

    if not script.is_file():
        raise ConfigError(f"{str(script)!r}: is neither a script nor the folder of a run.")
    # As `python SCRIPT` does: its neighbours can be imported.
    sys.path.insert(0, str(script.parent))
    try:
        with finding_only(FIND_SHARE if share is None else share):
            runpy.run_path(str(script), run_name="__main__")
    except FoundError as found:
        return found.finding
    except ModuleNotFoundError as error:
        # What this command itself needs was imported above.
        raise ConfigError(
            f"{str(script)!r}: imports {error.name or error}, which this Python does not have; install it, or run "
            f"the command with the Python that has it (this one is {sys.executable})."
        ) from error
    finally:
        sys.path.remove(str(script.parent))
    raise ConfigError(
        f"{str(script)!r}: has come to its end without AutoLRS.run() or next_action(), or a step of a framework with a "
        "tuner in it."
    )
