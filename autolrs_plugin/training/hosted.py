"""Runs inside of a loop that a framework owns: the actions that are not training take place between its steps.

The framework's step count, its stream of data and its logs stay untouched: a probe draws batches of its own and is
rolled back. A `Train` action is spread over the framework's steps, one learning rate each. What cannot be done is to
take back a real step (`rewind` is off). The run's state is a journal as text, for the framework's own checkpoints.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.files import written_whole
from autolrs_plugin.core.finding import finding
from autolrs_plugin.core.journal import FILE_NAME, Entry, Journal, JournalError, journal_text, read_text
from autolrs_plugin.core.ledger import Ledger
from autolrs_plugin.core.replay import check_same_run, replay
from autolrs_plugin.core.schedule import Schedule
from autolrs_plugin.core.state import Stage
from autolrs_plugin.report import draw_run
from autolrs_plugin.training.arguments import checked_folder
from autolrs_plugin.training.checking import plain_numbers
from autolrs_plugin.training.distributed import RankedPort, ranks_of_job
from autolrs_plugin.training.finding_only import FoundError, share_to_find, to_find
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.loop import TorchLoop
from autolrs_plugin.training.metering import metered
from autolrs_plugin.training.ports import Observer, OnStep, Port, Steps
from autolrs_plugin.training.progress import warn_beforehand
from autolrs_plugin.training.session import Session
from autolrs_plugin.training.signals import SIGNALS

logger = logging.getLogger("autolrs_plugin")


class Host(Protocol):
    """What a run needs of the framework that it is in."""

    def probing(self, seed: int) -> AbstractContextManager[Callable[[], Any]]:
        """Return a function that takes one optimizer step on batches of the probe's own, and returns its loss.

        The generators have been seeded with `seed`. On leaving, the framework is what it was before, as far as that
        is not in the job's state.
        """

    def evaluate(self) -> Any:
        """Return the validation loss, unseen by the framework's loggers and callbacks."""

    def saving(self, as_kept: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """Inside, in a probe, a checkpoint that the framework is asked for is made inside of `as_kept()`."""


class HostedLoop(TorchLoop):
    """The session's port for a loop that a framework owns.

    Args:
        job: what is trained: the model as its parameters are named, torch's own optimizer, no step and no validation.
        host: the framework.

    Attributes:
        ranks: the processes that train together; None where this one is alone.
    """

    def __init__(self, job: Job, host: Host) -> None:
        super().__init__(job)
        self._schedules = False  # the framework's own, which was looked at before
        self._host = host
        self._validate = host.evaluate
        self.ranks = ranks_of_job()
        if self.ranks is not None:
            self.agreed = self.ranks.any

    def port(self) -> Port:
        """Return the session's port: this, or on one rank of several its part."""
        return self if self.ranks is None else RankedPort(self, self.ranks)

    def evaluate(self) -> float:
        """Return the validation loss, the mean over the ranks."""
        return float(self.mean(super().evaluate()))

    def mean(self, loss: Any) -> Any:
        """Return the mean of a loss over the ranks; where there is one alone, the loss itself, not read yet."""
        return loss if self.ranks is None else self.ranks.mean(float(loss))

    def check_metric(self, name: str) -> None:
        """Evaluate before any training, where a metric that is not there shows; warn of one that is not finite.

        Args:
            name: of the metric, for the warning.
        """
        value = self.evaluate()
        if not math.isfinite(value):
            logger.warning(
                "%s: is %s before any training; as long as it is not finite, the training loss decides.",
                name,
                value,
            )

    def saving(self) -> AbstractContextManager[None]:
        """Inside, in a probe, a checkpoint is that of the real step."""
        return self._host.saving(self.as_trained)

    def _take(self, batch: Any, with_batch: bool = False) -> float:
        return float(self.mean(super()._take(batch, with_batch)))

    def train(self, lrs: Sequence[float], on_step: OnStep) -> Steps:
        """Never called: the framework takes the run's own steps."""
        raise AssertionError("a step of the run is the framework's")

    def probe(self, lrs: Sequence[float], seed: int, abort_above: float, on_step: OnStep) -> Steps:
        """Take steps on minibatches drawn with `seed`; end where `ends` of `core.actions` says so."""
        self._begin_probe(seed)
        try:
            with self._host.probing(seed) as self._train_step:
                return self._compared(seed, lrs, self._steps(lrs, on_step, None, abort_above))
        finally:
            self._train_step = None

    def drop_snapshot(self) -> None:
        """Let go of the kept state."""
        self._keeper.drop()


class HostedRun:
    """One run inside of a framework's loop: `before_step` and `after_step` around each of its steps.

    Args:
        config: the settings; `rewind` must be off.
        loop: the port.
        state: what `state()` gave in a run before that goes on here; None for a new run.
        step: the framework's steps so far; None where it does not count them.
        observers: who shows the progress.

    Raises:
        JournalError: `state` is of another step, of another run or version, or corrupted.
        RuntimeError: there is a `state`, and it was made inside of `finding_only`.
    """

    def __init__(
        self,
        config: AutoLRSConfig,
        loop: HostedLoop,
        state: str | None = None,
        step: int | None = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        assert not config.rewind, "a hosted run cannot take back its own steps"
        self._only_finds = (share := share_to_find()) is not None
        if share is not None:
            config = to_find(config, share)
            if state is not None:
                raise RuntimeError(
                    "autolrs find: the script goes on with a run that has begun, and a rate is found before the first "
                    "step of a run; let it begin one (no checkpoint to resume from)."
                )
        self._ranks = loop.ranks
        self.controller = Controller(config) if self._ranks is None else self._ranks.controller(config)
        self._loop = loop
        self._kind = loop.kind()
        if self._ranks is not None:
            self._kind["processes"] = self._ranks.count
        self._entries: list[Entry] = []
        self._losses: list[Any] = []
        self._seconds = self._since = 0.0
        if state is not None:
            self._resume(state, step)
        shown: Sequence[Observer] = ()
        if self._ranks is None or self._ranks.leads:
            shown = observers
            warn_beforehand(self.controller)
        # Between two steps the weights are whoever's the framework lets at them.
        self._session = Session(self.controller, loop.port(), observers=shown, watched=False)
        self._action: Action = self._session.next_action()

    @property
    def step(self) -> int:
        """Real steps taken so far."""
        return self.controller.step + len(self._losses)

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each real step so far."""
        pending = self._action.lrs[: len(self._losses)] if isinstance(self._action, Train) else ()
        return Schedule(self.controller.schedule.lrs + pending)

    @metered("adapter")
    def before_step(self) -> float:
        """Carry out what is due before the framework's next step; set that step's learning rate and return it.

        Raises:
            FoundError: the script runs under `autolrs find`.
        """
        while not isinstance(self._action, Train | Done):
            self._act()
        if isinstance(self._action, Done):
            if self._only_finds:
                raise FoundError(finding(self.controller.state))
            logger.warning(
                "the framework takes more steps than the %d that AutoLRS was told of; they keep the last learning "
                "rate.",
                self.controller.config.max_steps,
            )
            return self.controller.schedule.lrs[-1]
        if not self._losses:
            # Nothing goes back to it any more: the next search takes a new one.
            self._loop.drop_snapshot()
            self._loop.rates.look()
        self._since = time.perf_counter()
        lr = self._action.lrs[len(self._losses)]
        self._loop.rates.set(lr)
        if not self._losses:
            self._loop.rates.watch()
        return lr

    @metered("adapter")
    def after_step(self, loss: Any) -> None:
        """Take the loss of the framework's step: a number, or a tensor of one element, which is not read yet."""
        if not isinstance(self._action, Train):
            return
        if not self._losses:
            self._loop.rates.check()
        self._losses.append(self._loop.mean(loss))
        self._seconds += time.perf_counter() - self._since
        if len(self._losses) < len(self._action.lrs):
            return
        losses = self._losses_so_far()
        if not all(map(math.isfinite, losses)):
            logger.warning(
                "the training loss was not finite between the steps %d and %d; go back to a checkpoint before them, "
                "with a lower lr_range.",
                self._action.first_step,
                self._action.first_step + len(losses),
            )
        seconds, self._seconds, self._losses = self._seconds, 0.0, []
        self._tell(Result(losses, seconds=max(seconds, 1e-9)))
        while isinstance(self._action, Evaluate):
            self._act()

    def state(self) -> str:
        """Return the run so far as text, for a checkpoint of the framework's; in a search, that before the search."""
        entries = list(self._entries)
        begun = max((i for i, entry in enumerate(entries) if isinstance(entry.action, Snapshot)), default=0)
        if not any(isinstance(entry.action, Train) for entry in [*entries[begun:], Entry(self._action)]):
            del entries[begun:]
        if isinstance(self._action, Train) and self._losses:
            entries.append(Entry(self._action, losses=self._losses_so_far()))
        return journal_text(self.controller.config.to_mapping(), self._kind, entries)

    def close(self) -> None:
        """Let go of the framework and its objects; what was found can still be read."""
        if self._loop is not None:
            self._loop.rates.unwatch()
        self._session = self._loop = None  # type: ignore[assignment]

    def _losses_so_far(self) -> tuple[float, ...]:
        return tuple(float(loss) for loss in self._losses)

    @metered("action")
    def _act(self) -> None:
        """Carry out an action that is not training."""
        if self._session.idle:  # an exception has ended it before
            self._action = self._session.next_action()
        with self._loop.saving() if isinstance(self._action, Probe) else nullcontext():
            result = self._session.perform(self._action)
        self._tell(result)

    def _tell(self, result: Result) -> None:
        with SIGNALS.whole():
            self._session.tell(result)
            self._entries.append(Entry(self._action, result, books=self.controller.ledger.overhead))
            self._action = self._session.next_action()

    def _resume(self, state: str, step: int | None) -> None:
        journal = read_text(state, "the AutoLRS state in the checkpoint")
        check_same_run(journal, self.controller.config.to_mapping(), self._kind)
        self._entries = list(replay(journal, self.controller))
        if journal.unfinished is not None:
            self._losses = list(journal.entries[-1].losses)
        if step is not None and self.step != step:
            raise JournalError(
                f"the AutoLRS state in the checkpoint is of step {self.step}, and training goes on at step {step}: "
                "they do not belong together."
            )


@contextmanager
def saved_by(owner: Any, name: str, inside: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, a call of the method `name` of `owner` takes place inside of `inside()`."""
    own, method = vars(owner).get(name), getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with inside():
            return method(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        if own is not None:
            setattr(owner, name, own)


def hosted_config(name: str, max_steps: int, validation: bool, settings: Mapping[str, Any]) -> AutoLRSConfig:
    """Return the settings of a hosted run; `name` is the user's door, for errors.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    for key in ("max_steps", "validation", "rewind"):
        if key in settings:
            raise ConfigError(f"{name}: {key!r} is no setting here; the framework's own settings decide it.")
    fixed = {"max_steps": max_steps, "validation": validation, "rewind": False}
    return AutoLRSConfig.from_mapping(plain_numbers({**settings, **fixed}), origin=name)


def check_begin(name: str, step: int, state: str | None, run: HostedRun | None) -> None:
    """Raise RuntimeError if a hosted run can neither begin nor go on at the framework's `step`.

    Args:
        name: the user's door.
        state: the state of a run in the checkpoint that the framework resumes from.
        run: what the same door has held before.
    """
    if state is None and step > 0:
        raise RuntimeError(
            f"{name}: training has already started (it is at step {step}) and the checkpoint holds no AutoLRS state; "
            "begin a new run, or resume one that was begun with AutoLRS."
        )
    if state is None and run is not None and run.step > 0:
        raise RuntimeError(
            f"{name}: has tuned {run.step} steps already; make a new one for another run, or resume from a checkpoint."
        )


class HostedResults:
    """What a callback that holds a hosted run tells of it, while it goes on and afterwards."""

    run: HostedRun | None = None

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step so far."""
        return self._held().schedule

    @property
    def ledger(self) -> Ledger:
        """What training, search, evaluations and snapshots have cost so far."""
        return self._held().controller.ledger

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The searches so far, with their candidates."""
        return self._held().controller.stages

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a picture: learning rate and loss over the steps, with the probes as branches."""
        draw_run(self._held().controller, Path(path))

    def save(self, run_dir: str | os.PathLike[str]) -> None:
        """Write the run so far into a folder that `autolrs show`, `plot` and `export` take.

        Raises:
            ValueError: it is a file, or holds a run that `AutoLRS(run_dir=...)` goes on with.
        """
        folder = checked_folder(Path(run_dir))
        assert folder is not None, "None is no path"
        path, text = folder / FILE_NAME, self._held().state()
        if path.exists() and Journal.read(path).header.get("checkpoint"):
            raise ValueError(
                f"run_dir={str(run_dir)!r}: holds a run that can be resumed, which this would replace; choose another "
                "folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")

    def _held(self) -> HostedRun:
        if self.run is None:
            raise RuntimeError("AutoLRS: training has not begun yet.")
        return self.run
