"""The seams of a session: what a framework implements, who shows a run or carries out probes, where its journal is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autolrs_plugin.core.actions import Action, Probe, Result
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import Checkpoint, Journal

OnStep = Callable[[float, float], None]
"""Called after each step with its learning rate and its loss."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Training steps taken: the loss of each, tokens (or samples) trained on in all, and whether `asked` ended them."""

    losses: tuple[float, ...]
    tokens: int = 0
    stopped: bool = False


class Port(Protocol):
    """What a training framework implements."""

    def train(self, lrs: Sequence[float], on_step: OnStep) -> Steps:
        """Take one step at each learning rate on the run's own stream of data."""

    def probe(self, lrs: Sequence[float], seed: int, abort_above: float, on_step: OnStep) -> Steps:
        """Take steps on minibatches drawn with `seed`; end where `ends` of `core.actions` says so."""

    def evaluate(self) -> float:
        """Return the validation loss; afterwards the job is what it was before, generators included."""

    def snapshot(self) -> None:
        """Keep the whole state, in place of the one kept before."""

    def restore(self) -> None:
        """Go back to the kept state."""

    def asked(self) -> bool:
        """Tell whether the process is asked for something else than a search; several agree on it."""

    def fingerprint(self) -> str:
        """Return a value that changes when a weight does."""

    def write_state(self, path: Path) -> str:
        """Write the state to a file, whole or not at all; return its SHA-256."""

    def read_state(self, path: Path, sha256: str) -> None:
        """Go to the state that a file holds."""

    def keep_state(self, path: Path, sha256: str) -> None:
        """Make the state that a file holds the kept one."""


class Observer(Protocol):
    """Whoever shows the progress of a run."""

    def on_action(self, action: Action, controller: Controller) -> None:
        """An action is about to be carried out."""

    def on_step(self, lr: float, loss: float) -> None:
        """A step was taken, of the run or of a probe."""

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        """The controller has taken an action's result."""

    def close(self) -> None:
        """The run is complete, or has failed."""


class Prober(Protocol):
    """Whoever carries out probes elsewhere than in this process."""

    def attach(self, kept_state: Callable[[], bytes]) -> None:
        """Take note of what returns the state that every probe starts from, as a file's content."""

    def probe(self, ahead: Sequence[Probe], seed: int) -> Result | None:
        """Return the result of the first of `ahead`; None where nobody can: then it is carried out here.

        Args:
            ahead: probes that are next whatever comes of the first; all may be begun.
            seed: of the search.
        """

    def forget(self) -> None:
        """The kept state is another one from now on."""

    def close(self) -> None:
        """No probe will follow."""


class Journals(Protocol):
    """Where the journal of a run is found."""

    def exists(self, path: Path) -> bool:
        """Tell whether there is a run already."""

    def create(
        self, path: Path, config: Mapping[str, Any], run: Mapping[str, Any], checkpoint: Checkpoint
    ) -> Journal:
        """Begin a journal."""

    def open(self, path: Path) -> Journal:
        """Read a journal and hold it for writing."""


class JournalFiles:
    """The journal of a run with one process: its file."""

    exists = staticmethod(Path.exists)
    create = staticmethod(Journal.create)
    open = staticmethod(Journal.open)


JOURNAL_FILES = JournalFiles()
