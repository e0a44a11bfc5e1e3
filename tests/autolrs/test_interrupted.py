"""What ends an action in its midst: the user's own exception is what is seen, and what can go on goes on."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import JournalError
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.core.state import Plan, RunState
from autolrs_plugin.training.holdings import restore_slots
from autolrs_plugin.training.session import Session
from autolrs_plugin.training.signals import SIGNALS
from tests.autolrs.jobs import Job
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, ModuleAttributes, everything, tuner_of


class Stopping:
    """Watches which action is going on."""

    kind = ""

    def on_action(self, action: Action, controller: Controller) -> None:
        self.kind = type(action).__name__

    def on_step(self, lr: float, loss: float) -> None:
        pass

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        pass

    def close(self) -> None:
        pass


class Stopped(Kind):
    """A job that Ctrl-C ends once, in an action of a kind."""

    def __init__(self, kind: str = "", after: int = 1) -> None:
        super().__init__()
        self.watch, self.left, self.stops = Stopping(), after, kind
        self.stopped = threading.Event()  # which no rollback sets back
        self.options = {"observers": [self.watch]}

    def stop(self) -> None:
        if self.watch.kind == self.stops:
            self.left -= 1
            if self.left <= 0 and not self.stopped.is_set():
                self.stopped.set()
                raise KeyboardInterrupt

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.stop()

    def validate(self) -> float:
        self.stop()
        return super().validate()


def to_the_end() -> dict[str, Any]:
    job = Stopped()
    with script(PLAN):
        tuner_of(job).run()
    return everything(job)


@pytest.mark.parametrize("kind", ["Evaluate", "Probe"])
def test_what_is_taken_back_can_be_asked_for_again(kind: str) -> None:
    job = Stopped(kind)
    with script(PLAN):
        tuner = tuner_of(job)
        with pytest.raises(KeyboardInterrupt):
            tuner.run()
        tuner.run()
    assert everything(job) == to_the_end()


def test_ctrl_c_while_the_search_decides_is_let_out_when_that_is_done() -> None:
    job, ended, runs = Stopped(), 0, threading.Event()

    def deciding(_: RunState) -> Plan:
        for action in PLAN:
            yield action
            if runs.is_set():  # and not while the plan is looked through beforehand
                signal.raise_signal(signal.SIGINT)
        yield Done()

    with patch.dict(PLANS, {"staged": deciding}):
        tuner = tuner_of(job)
        runs.set()
        while ended <= len(PLAN):
            try:
                tuner.run()
                break
            except KeyboardInterrupt:
                ended += 1
    assert ended == len(PLAN)
    assert everything(job) == to_the_end()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait() -> None:
    pressed = []

    def decide() -> None:
        with SIGNALS.whole():
            for press in range(3):
                signal.raise_signal(signal.SIGINT)
                pressed.append(press)

    with pytest.raises(KeyboardInterrupt):
        decide()
    assert pressed == [0]


def test_ctrl_c_between_a_result_and_its_being_told_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = to_the_end()
    job, real, left = Stopped(), Session.tell, [KeyboardInterrupt, None] * len(PLAN)

    def tell(session: Session, result: Result) -> None:
        if error := left.pop(0):
            raise error
        real(session, result)

    monkeypatch.setattr(Session, "tell", tell)
    with script(PLAN):
        tuner = tuner_of(job)
        for _ in PLAN:
            with pytest.raises(KeyboardInterrupt):
                tuner.run()
        tuner.run()
    assert everything(job) == wanted


def test_after_an_interrupt_amid_the_runs_own_steps_a_new_one_goes_on_in_the_same_process(
    tmp_path: Path,
) -> None:
    job = Stopped("Train", after=4)
    with script(PLAN):
        tuner = tuner_of(job, run_dir=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            tuner.run()
        for again in (tuner.run, tuner.next_action, tuner.find):
            with pytest.raises(
                RuntimeError, match=r"KeyboardInterrupt has ended this run .* goes on at step 2"
            ):
                again()
        with pytest.raises(
            JournalError, match=r"'prior_lr' is 0.1, .*reads the optimizer's rate, which training"
        ):
            tuner_of(job, run_dir=tmp_path)
        job = Stopped()
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == to_the_end()


def test_without_a_folder_an_interrupt_amid_the_runs_own_steps_ends_it() -> None:
    with script(PLAN):
        tuner = tuner_of(Stopped("Train"))
        with pytest.raises(KeyboardInterrupt):
            tuner.run()
        with pytest.raises(
            RuntimeError,
            match="AutoLRS again, as the script does; with a run_dir, a run goes on where it was",
        ):
            tuner.run()


class MineError(Exception):
    """The user's."""


def test_the_users_own_exception_is_what_is_raised_and_what_was_lost_is_in_its_notes() -> None:
    job, numbers = Stopped(), iter(range(100))

    def step(index: torch.Tensor) -> torch.Tensor:
        if job.watch.kind == "Probe":
            next(numbers)
            raise MineError("of the user's own code")
        return Kind.step(job, index)

    job.step = step  # type: ignore[method-assign]
    with script(PLAN):
        tuner = tuner_of(job)
        with pytest.raises(MineError, match="of the user's own code") as raised:
            tuner.run()
        assert "numbers (a range_iterator): was changed by a probe" in "".join(raised.value.__notes__)
        with pytest.raises(RuntimeError, match=r"numbers \(a range_iterator\): was changed by a probe"):
            tuner.run()
    assert len(tuner.schedule) == 2


def test_a_search_in_which_no_loss_is_finite_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def run(bad: str) -> AutoLRS:
        job = Stopped()

        def step(index: torch.Tensor) -> torch.Tensor:
            loss = Kind.step(job, index)
            return loss * float("nan") if job.watch.kind == bad else loss

        tuner = AutoLRS(
            job.model,
            job.optimizer,
            train_step=step,
            train_data=job.data,
            max_steps=300,
            lr_range=(1e-3, 1.0),
            progress=False,
            **job.options,
        )
        tuner.run()
        return tuner

    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        run("none")
        assert "finite" not in caplog.text
        tuner = run("Probe")
    assert tuner.stages
    assert caplog.text.count("had only finite losses, at learning rates from") == len(tuner.stages)


def test_what_was_broken_off_is_pending_no_more() -> None:
    plan = (Train(0, (0.1,)), Snapshot(), Probe(0, 0, (0.1,), float("inf"), evaluate=False), Restore())
    with script(plan):
        tuner = tuner_of(Stopped("Probe"), validate=None, max_steps=1)
        with pytest.raises(KeyboardInterrupt):
            tuner.run()
        assert tuner._session.idle


def test_an_error_in_the_steps_that_are_tried_at_construction_has_changed_nothing() -> None:
    torch.manual_seed(0)
    job = Job("momentum")
    before, state = job.bits(), torch.get_rng_state()

    def step() -> torch.Tensor:
        job.step()
        raise MineError("out of memory")

    with pytest.raises(MineError):
        AutoLRS(job.model, job.optimizer, train_step=step, max_steps=4, lr_range=(1e-3, 1.0), progress=False)
    assert job.bits() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("where", ["step", "validate"])
def test_an_error_amid_the_switching_of_gradients_leaves_them_on(where: str) -> None:
    job, armed = Kind(), [False]
    function = getattr(job, where)

    def switching(*args: Any) -> Any:
        if armed[0]:
            torch.set_grad_enabled(False)  # as a `with torch.no_grad()` that Ctrl-C ends in its own code
            raise KeyboardInterrupt
        return function(*args)

    setattr(job, where, switching)
    with script(PLAN):
        tuner = tuner_of(job)
    for _ in range(2):
        tuner.tell(tuner.perform(tuner.next_action()))
    armed[0] = True
    try:
        with pytest.raises(KeyboardInterrupt):
            tuner.perform(tuner.next_action())
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_a_timer_whose_handler_raises_while_the_job_is_set_back_is_let_out_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(number: int, frame: Any) -> None:
        raise MineError("a step took too long")

    job = ModuleAttributes()
    fired = Fired(restore_slots)
    monkeypatch.setattr("autolrs_plugin.training.snapshot.restore_slots", fired)
    handler = signal.signal(signal.SIGALRM, late)
    try:
        with script(PLAN):
            tuner = tuner_of(job)
        for _ in range(2):
            tuner.tell(tuner.perform(tuner.next_action()))
        before, fired.left = everything(job), 2  # after the evaluation, and after the probe
        with pytest.raises(MineError):
            tuner.perform(tuner.next_action())
        assert everything(job) == before
        assert not fired.left
    finally:
        signal.signal(signal.SIGALRM, handler)


class Fired:
    """A function amid which an alarm goes off, when it has been called so often."""

    def __init__(self, function: Any) -> None:
        self.function, self.left = function, 0

    def __call__(self, *args: Any) -> Any:
        if self.left:
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGALRM)
        return self.function(*args)
