"""Batches that another thread puts into a container, or another process sends: named before the first probe."""

import itertools
import multiprocessing
import socket
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from autolrs_plugin.training.forms import forms
from autolrs_plugin.training.plain import is_data, is_log, is_plain
from autolrs_plugin.training.slots import Slots
from autolrs_plugin.training.tree import Copier
from autolrs_plugin.training.watched import batch_seen, data_seen
from tests.autolrs.scripted import script
from tests.autolrs.test_flags import beside_a_thread
from tests.autolrs.test_inventory import PLAN, Kind, tuner_of
from tests.autolrs.test_reach import drawing


class Filled(Kind):
    """Another thread keeps a container filled that the step takes from."""

    made: Any = staticmethod(deque)

    def prepare(self) -> None:
        self.ready, self.stop = self.made(), threading.Event()
        self.thread = threading.Thread(target=self.fill, name="reader", daemon=True)
        self.thread.start()

    def fill(self) -> None:
        while not self.stop.wait(0.0005):
            if len(self.ready) < 3:
                self.add(torch.randn(16))

    def add(self, noise: torch.Tensor) -> None:
        self.ready.append(noise)

    def take(self) -> torch.Tensor:
        return self.ready.popleft()

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        while not self.ready:
            self.stop.wait(0.001)
        self.x[index] += 0.1 * self.take()


class FilledList(Filled):
    made = staticmethod(list)

    def take(self) -> torch.Tensor:
        return self.ready.pop(0)


class FilledDict(Filled):
    made = staticmethod(dict)
    put = taken = 0

    def add(self, noise: torch.Tensor) -> None:
        self.ready[self.put] = noise
        self.put += 1

    def take(self) -> torch.Tensor:
        self.taken += 1
        return self.ready.pop(self.taken - 1)


@pytest.mark.parametrize("kind", [Filled, FilledList, FilledDict])
def test_a_container_that_a_thread_fills_is_named_before_the_first_probe(kind: Any) -> None:
    job = kind()
    try:
        with script(PLAN):
            tuner = tuner_of(job)
            with pytest.raises(RuntimeError, match=r"ready \(a \w+\): is filled by the thread 'reader'"):
                tuner.run()
        assert len(tuner.schedule) == 2
    finally:
        job.stop.set()
        job.thread.join()


class Watched(Filled):
    """The thread notes what no step looks at."""

    def prepare(self) -> None:
        self.noted: list[float] = []
        super().prepare()

    def fill(self) -> None:
        while not self.stop.wait(0.0005):
            self.noted.append(1.0)
            if len(self.noted) > 100:
                self.noted.clear()

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        return


class Written(Filled):
    """The thread takes what the step says."""

    def prepare(self) -> None:
        self.written: list[float] = []
        super().prepare()

    def fill(self) -> None:
        while not self.stop.wait(0.0005):
            while self.ready:
                self.written.append(self.ready.popleft())

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.ready.append(loss.item())


@pytest.mark.parametrize("kind", [Watched, Written])
def test_a_thread_from_which_no_step_takes_is_let_be(kind: Any) -> None:
    job = kind()
    try:
        with script(PLAN):
            tuner = tuner_of(job)
            tuner.run()
        assert tuner.ledger.search.steps == 11
    finally:
        job.stop.set()
        job.thread.join()


def a_queue_of_another_process() -> Any:
    numbers: Any = multiprocessing.SimpleQueue()
    for i in range(50):
        numbers.put(i)
    return lambda: numbers.get()


def a_pipe() -> Any:
    ours, theirs = multiprocessing.Pipe()
    for i in range(50):
        theirs.send(i)
    return lambda: (ours.recv(), theirs)


def a_socket() -> Any:
    ours, theirs = socket.socketpair()
    theirs.send(bytes(50))
    return lambda: (ours.recv(1), theirs)


def what_a_child_says() -> Any:
    child = subprocess.Popen(["seq", "1", "1000"], stdout=subprocess.PIPE)
    return lambda: child.stdout.readline()  # type: ignore[union-attr]


CHANNELS = {
    a_queue_of_another_process: r"numbers \(a SimpleQueue\)",
    a_pipe: r"ours \(a Connection\)",
    a_socket: r"ours \(a socket\)",
    what_a_child_says: r"child \(a Popen\)",
}


@pytest.mark.parametrize("make", CHANNELS, ids=lambda make: make.__name__)
def test_what_another_process_sends_is_named_before_the_first_probe(make: Callable[[], Any]) -> None:
    with script(PLAN):
        tuner = tuner_of(drawing(make()))
        with pytest.raises(RuntimeError, match=rf"{CHANNELS[make]}: brings what another process sends"):
            tuner.run()
    assert len(tuner.schedule) == 2


def test_a_queue_that_a_step_only_writes_to_is_let_be() -> None:
    lines: Any = multiprocessing.SimpleQueue()
    names = {"a": 1}

    def draw() -> None:
        lines.put(names.get("a"))

    with script(PLAN):
        tuner = tuner_of(drawing(draw))
        tuner.run()
    assert tuner.ledger.search.steps == 11


@contextmanager
def refilled(container: Any) -> Iterator[None]:
    """Let another thread put items into a container and take them out, as fast as it can."""

    def fill(stop: threading.Event) -> None:
        for i in itertools.count(100):
            if stop.is_set():
                return
            if isinstance(container, dict):
                container[i] = i
                del container[i]
            elif isinstance(container, set):
                container.add(i)
                container.remove(i)
            else:
                container.append(i)
                container.pop()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with beside_a_thread(fill):
            yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "make", [list, deque, set, dict.fromkeys, lambda n: defaultdict(int, dict.fromkeys(n))]
)
@pytest.mark.parametrize("ask", [is_plain, is_data, is_log, data_seen, batch_seen, Copier().copy])
def test_a_container_is_looked_at_while_another_thread_fills_it(make: Any, ask: Any) -> None:
    container = make(range(50))
    with refilled(container):
        for _ in range(300):
            ask(container)
            ask([container])


def test_the_form_of_a_container_is_taken_while_another_thread_fills_it() -> None:
    job: Any = Kind()
    job.ready = deque({i} for i in range(50))
    with refilled(job.ready):
        for _ in range(300):
            forms({"job": Slots(job, "user")})
