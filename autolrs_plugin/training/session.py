"""Session: carries out the controller's actions on a training job, and keeps the journal.

A framework implements the port; deciding is the controller's. The journal has each action before it takes effect, and
its result after. States of the run's own stream are files beside the journal, one for each `Train`, of which the
current and the kept one are there at any time: that is all a killed job needs to go on.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import FILE_NAME, Checkpoint, Journal, JournalError
from autolrs_plugin.core.replay import check_same_run, replay
from autolrs_plugin.training.checkpoint import CheckpointError
from autolrs_plugin.training.metering import as_waited_for, owner_of, owning
from autolrs_plugin.training.ports import JOURNAL_FILES, Journals, Observer, Port, Prober, Steps
from autolrs_plugin.training.signals import SIGNALS
from autolrs_plugin.training.transaction import carry_out, evaluated, gradients_kept

logger = logging.getLogger("autolrs_plugin")


class Session:
    """One run: `next_action`, `perform` and `tell` in turn, until `Done`.

    Args:
        controller: decides; must be new.
        port: the training job.
        run_dir: where the journal and the states go; None to keep none.
        identity: what tells this run from others: plain values, compared when a run is resumed. Those under
            `initial` are compared only where the user has not said that this is the run (`resume=True`).
        resume: `auto` goes on with the run in `run_dir` if there is one; True insists on one; False on none.
        observers: who shows the progress.
        journals: finds, begins and opens the journal.
        prober: who may carry out probes elsewhere.
        watched: whether to see that nobody else changes the weights between two actions.

    Raises:
        JournalError: there is a journal and it is of another run or version, corrupted, or in use; or what
            `resume` insists on is not so.
    """

    def __init__(
        self,
        controller: Controller,
        port: Port,
        run_dir: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        resume: bool | str = "auto",
        observers: Sequence[Observer] = (),
        journals: Journals = JOURNAL_FILES,
        prober: Prober | None = None,
        watched: bool = True,
    ) -> None:
        self.controller = controller
        self._port = port
        self._run_dir = run_dir
        self._observers = tuple(observers)
        self._journals = journals
        self._prober = prober
        self._watched = watched
        self.closed = False
        self._over = "AutoLRS: was closed; make a new one to train (with the same run_dir it goes on)."
        self._pending: Action | None = None
        self._pending_since = 0.0
        self._untold: Result | None = None
        self._is_validation_known = False
        # Whether this session itself has left the job in the kept state.
        self._clean = self._performed = False
        self._journal: Journal | None = None
        self._current: Checkpoint | None = None
        self._kept: Checkpoint | None = None
        if run_dir is not None:
            self._journal = self._open(run_dir, dict(identity or {}), resume)
        self._fingerprint = self._seen()

    def run(self) -> None:
        """Carry out all actions up to the end."""
        watched = self._watched
        try:
            if self._untold is not None:  # something has ended the last run() before this was told
                self.tell(self._untold)
            action = self.next_action()
            self._watched = False  # from here on nobody else has a turn between two actions
            while not isinstance(action, Done):
                action = self._told(self.perform(action))
        finally:
            self._watched = watched
            if not self._is_over:  # nothing can be trained any more, so nobody compares it
                self._fingerprint = self._seen()
            SIGNALS.unwatch()
            for observer in self._observers:
                observer.close()
            if self._prober is not None:
                self._prober.close()

    def _told(self, result: Result) -> Action:
        """Tell a result and return the next action, with one pause for signals.

        What ends it when the next action has been asked for leaves that to be asked for again.
        """
        asked = False
        try:
            with SIGNALS.whole():
                self.tell(result)
                action = self.next_action()
                asked = True
        except BaseException:
            if asked:
                self._pending = None
            raise
        return action

    def next_action(self) -> Action:
        """Return the action to carry out now; it is in the journal from here on.

        Raises:
            RuntimeError: the result of the last one is still missing, the weights have been changed since, or the
                session was closed.
        """
        self.check_open()
        if self._pending is not None and not self._is_over:
            raise RuntimeError(
                f"tell() the result of {type(self._pending).__name__} before asking for another action."
            )
        started = time.perf_counter()
        if not self._is_over and self._seen() != self._fingerprint:
            raise RuntimeError(
                "model: its weights were changed between two actions by something other than the tuner, so its losses "
                "would not be those of the schedule; train and load weights only inside train_step."
            )
        with SIGNALS.whole():
            action = self.controller.next()
            if self._journal is not None:
                action = self._journal.unfinished or action
                with self._writing(self.controller.step):
                    self._journal.intend(action, self.controller.ledger.overhead)
            for observer in self._observers:
                observer.on_action(action, self.controller)
            self._pending, self._pending_since = action, time.perf_counter()
        self.controller.ledger.bookkeeping_s += self._pending_since - started
        return action

    @property
    def _is_over(self) -> bool:
        return isinstance(self._pending, Done)

    @property
    def idle(self) -> bool:
        """Whether no action is pending: at the beginning, after a result, and after an exception."""
        return self._pending is None

    def perform(self, action: Action) -> Result:
        """Carry out an action on the port; return its result, which `tell` takes.

        Raises:
            ValueError: it is not the one that is pending.
        """
        self.check_open()
        if action != self._pending:
            raise ValueError(
                f"perform({action!r}): is not the action that next_action() gave; give that one."
            )
        self._performed = True
        try:
            with owning(owner_of(action)):
                self._untold = self._undisturbed(action)
            return self._untold
        except BaseException as error:
            self._broken_off(action, error)
            raise

    @gradients_kept()
    def _undisturbed(self, action: Action) -> Result:
        """Carry out an action so that no handler of a signal sees another job than that of the real step."""
        if isinstance(action, Train):
            return self._carried_out(action)
        result = self._elsewhere(action) if isinstance(action, Probe) else None
        if result is None:
            with SIGNALS.held(watched_after=isinstance(action, Snapshot | Probe)):
                self._keep_what_was_set(action)
                result = self._probe(action) if isinstance(action, Probe) else self._carried_out(action)
        if result.stopped:
            SIGNALS.asked = False
        return result

    def _keep_what_was_set(self, action: Action) -> None:
        """Keep the state anew if a handler has been called since: going back must not undo what it has set."""
        if isinstance(action, Snapshot):
            SIGNALS.forget()
        elif SIGNALS.called and isinstance(action, Probe | Restore):
            SIGNALS.called = False
            if self._clean:
                self._snapshot()
                return
            logger.warning(
                "a signal's handler was called in steps that are taken back now, and what it has set in the job with "
                "them; set a threading.Event, which is not, and look at it after each step."
            )

    def _snapshot(self) -> None:
        self._port.snapshot()
        if self._prober is not None:
            self._prober.forget()

    def _carried_out(self, action: Action) -> Result:
        started = time.perf_counter()
        steps, val_loss = Steps(()), None
        if isinstance(action, Train):
            steps = self._port.train(action.lrs, self._on_step)
        elif isinstance(action, Snapshot):
            self._snapshot()
        elif isinstance(action, Restore):
            self._port.restore()
        elif isinstance(action, Evaluate):
            val_loss = evaluated(self._port)
        seconds = time.perf_counter() - started
        eval_s = 0.0 if val_loss is None else seconds
        return Result(steps.losses, val_loss, seconds, eval_seconds=eval_s, tokens=steps.tokens)

    def tell(self, result: Result) -> None:
        """Take the result of the pending action: the controller decides on, the journal has it.

        An interrupt comes through when that is done, and leaves the next action to be asked for.

        Raises:
            RuntimeError: no action is pending.
            ValueError: the result does not fit the action.
        """
        self.check_open()
        action = self._pending
        if action is None or isinstance(action, Done):
            raise RuntimeError("there is no action to tell a result of; ask for one with next_action().")
        with SIGNALS.whole():
            self._take(action, result)

    def _take(self, action: Action, result: Result) -> None:
        started, ledger = time.perf_counter(), self.controller.ledger
        if not result.seconds:
            result = replace(result, seconds=started - self._pending_since)
        self._look_at_val_loss(action, result)
        decided_s = ledger.deciding_s
        with owning(owner_of(action)):
            self.controller.tell(result)
        with self._writing(action.first_step if isinstance(action, Train) else self.controller.step):
            self._write_down(action, result)
        self._pending = self._untold = None
        in_kept = isinstance(action, Snapshot | Restore | Probe) or (
            self._clean and isinstance(action, Evaluate)
        )
        self._clean, self._performed = self._performed and in_kept, False
        self._fingerprint = self._seen()
        for observer in self._observers:
            observer.on_result(action, result, self.controller)
        ledger.bookkeeping_s += time.perf_counter() - started - (ledger.deciding_s - decided_s)

    def _write_down(self, action: Action, result: Result) -> None:
        if self._journal is None:
            return
        checkpoint = self._checkpoint(action)
        self._journal.complete(result, checkpoint)
        self._follow(action, checkpoint)
        self._journal.keep_only({c.file for c in (self._current, self._kept) if c is not None})

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Inside, the run's folder is written to; where that is not possible, the run ends, as if it were killed.

        Args:
            step: at which it goes on, then.
        """
        try:
            yield
        except (CheckpointError, JournalError, OSError) as error:
            self._over = (
                f"AutoLRS: this run has ended, for it could not be written down: {error} Start the script again, and "
                f"it goes on at step {step}."
            )
            self.close()
            raise

    def close(self) -> None:
        """Let go of the run's folder, and of whoever carries out probes; nothing can be carried out any more."""
        self.closed = True
        SIGNALS.unwatch()
        if self._prober is not None:
            self._prober.close()
        if self._journal is not None:
            self._journal.close()

    def check_open(self) -> None:
        """Raise RuntimeError if it was closed: what came now would be in no journal."""
        if self.closed:
            raise RuntimeError(self._over)

    def _seen(self) -> str:
        return self._port.fingerprint() if self._watched else ""

    def _on_step(self, lr: float, loss: float) -> None:
        for observer in self._observers:
            observer.on_step(lr, loss)

    def _probe(self, probe: Probe) -> Result:
        return carry_out(probe, self._port, self.controller.config.seed, self._on_step, self._clean)

    def _elsewhere(self, probe: Probe) -> Result | None:
        """Return a probe's result from whoever carries it out elsewhere; None where nobody can.

        The job stays what it is meanwhile, so that handlers of signals are called at once.
        """
        if self._prober is None:
            return None
        with SIGNALS.held(watched_after=True):
            self._keep_what_was_set(probe)
        started = time.perf_counter()
        result = self._prober.probe((probe, *self.controller.ahead[1:]), self.controller.config.seed)
        if result is None:
            return None
        result = replace(result, stopped=result.stopped or self._port.asked())
        return as_waited_for(result, time.perf_counter() - started)

    def _broken_off(self, action: Action, error: BaseException) -> None:
        """Take note of an action that an exception has ended: all but training may be asked for again.

        Of a step of the run itself nobody knows how far it has come; so the run ends here, and its folder is let go.
        """
        self._performed = self._clean = False
        self._untold = None
        SIGNALS.unwatch()
        if not isinstance(action, Train):
            self._pending = None
            return
        again = "create the model, the optimizer and AutoLRS again, as the script does"
        if self._run_dir is not None:
            again += f", with run_dir={str(self._run_dir)!r}: it goes on at step {action.first_step}"
        else:
            again += "; with a run_dir, a run goes on where it was"
        name = type(error).__name__
        self._over = (
            f"AutoLRS: a {name} has ended this run in one of its own steps, which cannot be undone; {again}."
        )
        self.close()

    def _look_at_val_loss(self, action: Action, result: Result) -> None:
        """Warn, once, of a validation loss that is not finite although the training loss is."""
        if self._is_validation_known or result.val_loss is None:
            return
        if isinstance(action, Probe) and not all(map(math.isfinite, result.losses)):
            return
        self._is_validation_known = True
        if not math.isfinite(result.val_loss):
            logger.warning(
                "validate: returned %s although the training loss is finite; where it does so at the rate in use, the "
                "training loss decides alone.",
                result.val_loss,
            )

    def _open(self, run_dir: Path, identity: dict[str, Any], resume: bool | str) -> Journal:
        path = run_dir / FILE_NAME
        if not self._journals.exists(path):
            if resume is True:
                raise JournalError(f"run_dir={str(run_dir)!r}: holds no run to resume.")
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise JournalError(
                    f"run_dir={str(run_dir)!r}: cannot be made ({error.strerror}); give a folder that can be "
                    "written to."
                ) from error
            self._current = self._written(run_dir, 0)
            return self._journals.create(path, self.controller.config.to_mapping(), identity, self._current)
        if resume is False:
            raise JournalError(
                f"run_dir={str(run_dir)!r}: holds a run already; resume it, or choose another folder."
            )
        journal = self._journals.open(path)
        try:
            self._resume(journal, run_dir, identity, resume)
        except BaseException:
            journal.close()
            raise
        return journal

    def _resume(self, journal: Journal, run_dir: Path, identity: dict[str, Any], resume: bool | str) -> None:
        check_same_run(journal, self.controller.config.to_mapping(), identity, insist=resume is not True)
        self._current = Checkpoint(**journal.header["checkpoint"])
        for entry in replay(journal, self.controller):
            assert entry.result is not None
            self._follow(entry.action, entry.checkpoint)
            if entry.result.val_loss is not None and math.isfinite(entry.result.val_loss):
                self._is_validation_known = True
        if self._kept is not None and self._kept != self._current:
            self._port.keep_state(run_dir / self._kept.file, self._kept.sha256)
        self._port.read_state(run_dir / self._current.file, self._current.sha256)
        if self._kept is not None and self._kept == self._current:
            self._port.snapshot()

    def _written(self, run_dir: Path, number: int) -> Checkpoint:
        name = f"state-{number:05d}.safetensors"
        return Checkpoint(name, self._port.write_state(run_dir / name))

    def _checkpoint(self, action: Action) -> Checkpoint | None:
        if self._journal is None or self._run_dir is None or not isinstance(action, Train):
            return None
        return self._written(self._run_dir, len(self._journal.entries))

    def _follow(self, action: Action, checkpoint: Checkpoint | None) -> None:
        if isinstance(action, Snapshot):
            self._kept = self._current
        elif isinstance(action, Restore):
            self._current = self._kept
        elif isinstance(action, Train):
            self._current = checkpoint
