"""A handler of a signal is called when the job is that of the real step, and what it sets stays."""

import functools
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Result, Train
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import FILE_NAME, Journal
from autolrs_plugin.integrations import torch_loop
from autolrs_plugin.training import hosted
from autolrs_plugin.training.distributed import Ranks
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.signals import SIGNALS
from tests.autolrs.jobs import bits, outside
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, RATES, Kind, everything, plainly, tuner_of

CALLS = outside([])
"""Of functions and actions, those of probes included."""

ASKED = signal.SIGUSR1

Install = Callable[[int, Any], None]


class Asked(Kind):
    """A job that is sent a signal at one call of a function, and whose handler sets a flag."""

    def __init__(self, at: str = "", call: int = 0, number: int = ASKED) -> None:
        super().__init__()
        self.stop, self.at, self.call, self.number = False, at, call, number
        self.told: list[Any] = []

    def handler(self, number: int, frame: Any) -> None:
        self.stop = True
        self.told.append(weights(self))

    def called(self, name: str) -> None:
        CALLS.held.append(name)
        if name == self.at and CALLS.held.count(name) == self.call:
            signal.raise_signal(self.number)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.called("step")

    def validate(self) -> float:
        self.called("validate")
        return super().validate()


def weights(job: Kind) -> dict[str, bytes]:
    return {name: bits(value) for name, value in job.model.state_dict().items()}


@pytest.fixture
def install() -> Iterator[Install]:
    """Installs handlers, and puts those before them back."""
    CALLS.held.clear()
    before: dict[int, Any] = {}

    def install(number: int, handler: Any) -> None:
        before.setdefault(number, signal.signal(number, handler))

    yield install
    for number, handler in before.items():
        signal.signal(number, handler)


def weights_after(steps: int) -> dict[str, bytes]:
    """Return the weights after the first real steps of PLAN."""
    job = Kind()
    with script([Train(0, RATES[:steps])]):
        tuner_of(job, validate=None, max_steps=steps).run()
    return weights(job)


@pytest.mark.parametrize(
    ("at", "call", "steps"),
    [
        ("step", 3, 8),
        ("step", 5, 10),
        ("step", 6, 11),
        ("step", 9, 9),
        ("validate", 1, 11),
        ("validate", 2, 11),
    ],
)
def test_a_flag_that_is_set_while_a_probe_runs_stays(
    at: str, call: int, steps: int, install: Install
) -> None:
    job = Asked(at, call)
    install(ASKED, job.handler)
    with script(PLAN):
        tuner = tuner_of(job)
        tuner.run()
    assert job.stop
    assert job.told == [weights_after(2)]
    assert tuner.ledger.search.steps == steps  # the probe was left at once
    assert everything(job) == plainly(Kind())
    assert signal.getsignal(ASKED) == job.handler


class Asking:
    """Sends a signal when an action begins."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_action(self, action: Action, controller: Controller) -> None:
        CALLS.held.append(type(action).__name__)
        if self.kind == CALLS.held[-1] and CALLS.held.count(self.kind) == 1:
            signal.raise_signal(ASKED)

    def on_step(self, lr: float, loss: float) -> None:
        pass

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "steps"), [("Snapshot", 11), ("Probe", 7), ("Restore", 11), ("Evaluate", 11)]
)
def test_a_flag_that_is_set_between_two_actions_stays(kind: str, steps: int, install: Install) -> None:
    job = Asked()
    install(ASKED, job.handler)
    with script(PLAN):
        tuner = tuner_of(job, observers=[Asking(kind)])
        tuner.run()
    assert job.stop
    assert tuner.ledger.search.steps == steps
    assert everything(job) == plainly(Kind())


def test_a_flag_that_is_set_while_the_state_is_kept_stays(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Asked("save", 1)
    install(ASKED, job.handler)
    with script(PLAN):
        tuner = tuner_of(job)
        save = tuner._loop._keeper.save

        def saving() -> None:
            save()
            job.called("save")

        monkeypatch.setattr(tuner._loop._keeper, "save", saving)
        tuner.run()
    assert job.stop
    assert tuner.ledger.search.steps == 7  # the first probe was left before its first step


class OtherAsked(Ranks):
    """A rank beside which another one is asked for something else."""

    index, count = 0, 2

    def __init__(self) -> None:
        """Without any other process."""

    def share(self, message: Any = None) -> Any:
        return message

    def gather(self, message: Any) -> list[Any]:
        return [message, message]

    def mean(self, value: float) -> float:
        return value

    def any(self, condition: bool) -> bool:
        return True

    def together(self) -> Any:
        return nullcontext()


def test_a_signal_to_another_rank_is_left_a_search_for(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Kind()
    monkeypatch.setattr(torch_loop, "ranks_of_job", OtherAsked)
    with script(PLAN):
        tuner = tuner_of(job)
        tuner.run()
    assert tuner.ledger.search.steps == 0
    assert everything(job) == plainly(Kind())
    monkeypatch.setattr(hosted, "ranks_of_job", OtherAsked)
    host: Any = SimpleNamespace(evaluate=None)
    assert hosted.HostedLoop(Job(job.model, job.optimizer), host).asked()


def searching(job: Kind, **options: Any) -> AutoLRS:
    return tuner_of(job, validate=None, max_steps=200, lr_range=(1e-4, 1.0), search_budget=0.5, **options)


@pytest.mark.parametrize(("call", "again_at"), [(1, 5), (4, 5), (12, 20)])
def test_a_search_that_was_left_is_begun_again_and_replays(
    call: int, again_at: int, install: Install, tmp_path: Path
) -> None:
    """It begins a chunk later, or with the next stage where its steps are spent."""
    job, twin = Asked("step", call), Kind()
    install(ASKED, job.handler)
    tuner = searching(job, run_dir=tmp_path)
    tuner.run()
    assert job.stop
    assert tuner.stages[0].first_step == again_at
    assert len(CALLS.held) == 200 + tuner.ledger.search.steps
    with script([Train(0, tuner.schedule.lrs)]):
        tuner_of(twin, validate=None, max_steps=200).run()
    assert everything(job) == everything(twin)
    results = Journal.read(tmp_path / FILE_NAME).results()
    assert [result.stopped for result in results].count(True) == 1
    again = Controller.replayed(tuner._controller.config, results)
    assert (again.schedule, again.stages) == (tuner.schedule, tuner.stages)


@pytest.mark.parametrize("mode", ["find", "paper"])
def test_where_no_search_can_be_left_its_probe_is_repeated(mode: str, install: Install) -> None:
    found: list[Any] = []
    for call in (0, 10):
        CALLS.held.clear()
        job = Asked("step", call)
        install(ASKED, job.handler)
        tuner = searching(job) if mode == "find" else searching(job, mode="paper")
        if mode == "find":
            found.append(tuner.find(0.2).lr)
        else:
            tuner.run()
            found.append(tuner.schedule)
        assert job.stop == (call > 0)
        signal.signal(ASKED, signal.SIG_DFL)
    assert found[0] == found[1]


def test_a_handler_that_raises_ends_the_run_with_the_job_of_the_real_step(install: Install) -> None:
    def leave(number: int, frame: Any) -> None:
        raise SystemExit(7)

    job = Asked("step", 5, signal.SIGTERM)
    install(signal.SIGTERM, leave)
    with script(PLAN), pytest.raises(SystemExit):
        tuner_of(job).run()
    assert weights(job) == weights_after(2)
    assert signal.getsignal(signal.SIGTERM) is leave


def test_a_handler_that_is_installed_in_a_probe_counts_from_its_next_step(install: Install) -> None:
    job = Asked("step", 5)

    def after(loss: torch.Tensor, index: torch.Tensor) -> None:
        if len(CALLS.held) == 3:
            install(ASKED, job.handler)
        job.called("step")

    job.after = after  # type: ignore[method-assign]
    with script(PLAN):
        tuner_of(job).run()
    assert job.told == [weights_after(2)]
    assert signal.getsignal(ASKED) == job.handler


def test_a_process_that_was_forked_in_a_probe_has_its_own_handlers(install: Install) -> None:
    install(ASKED, lambda number, frame: os._exit(3))
    with SIGNALS.held():
        if not (child := os.fork()):
            signal.raise_signal(ASKED)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_what_cannot_be_held_is_told(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SIGNALS, "_told", set())
    job = Asked("step", 4, signal.SIGALRM)
    install(signal.SIGALRM, job.handler)
    with caplog.at_level(logging.WARNING, "autolrs_plugin"), script(PLAN):
        tuner_of(job).run()
        assert caplog.text.count("SIGALRM: its handler is called at once") == 1
        install(signal.SIGTERM, job.handler)
        other = threading.Thread(target=tuner_of(Kind()).run)
        other.start()
        other.join()
    assert caplog.text.count("SIGTERM: its handler is called in the main thread") == 1


class Watching(threading.Thread):
    """Sets a flag of a job's, or an event."""

    def __init__(self, job: Any) -> None:
        super().__init__(name="a class")
        self.job, self.ended = job, threading.Event()

    def run(self) -> None:
        self.ended.wait()
        self.job.stop = True


def test_a_thread_that_sets_what_is_taken_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    job, event = Asked(), threading.Event()

    def flag(job: Any) -> None:
        event.wait()
        job.stop = True

    def record(job: Any) -> None:
        event.wait()
        job.unknown = True  # no state of the job's, before
        event.set()

    threads = [
        threading.Thread(target=flag, args=(job,), name="a function"),
        threading.Thread(target=functools.partial(flag, job), name="a partial"),
        threading.Timer(1e-3, flag, (job,)),
        Watching(job),
        threading.Thread(target=record, args=(job,), name="another"),
    ]
    threads[2].name = "a timer"
    for thread in threads:
        thread.start()
    with caplog.at_level(logging.WARNING, "autolrs_plugin"), script(PLAN):
        tuner_of(job).run()
    event.set()
    cast(Watching, threads[3]).ended.set()
    for thread in threads:
        thread.join()
    told = [r.getMessage() for r in caplog.records if "the thread" in r.getMessage()]
    assert [re.findall(r"the thread '(.*)' sets stop: ", text) for text in told] == [
        ["a function"],
        ["a partial"],
        ["a timer"],
        ["a class"],
    ]


def test_what_is_taken_back_with_steps_of_the_run_is_told(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    job = Asked("step", 3)
    install(ASKED, job.handler)
    plan = (*PLAN[:2], Train(2, (0.05,)), *PLAN[4:])
    with caplog.at_level(logging.WARNING, "autolrs_plugin"), script(plan):
        tuner_of(job).run()
    assert "a signal's handler was called in steps that are taken back now" in caplog.text
