"""Batches that another thread prepares: waited for where that is enough, and named where it is not."""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from autolrs_plugin.training.watched import position
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, check_as_without_probes, tuner_of


class OneAhead(Kind):
    """A pool prepares the next batch's noise, from a generator, while the step goes on."""

    def prepare(self) -> None:
        self.pool, self.generator = ThreadPoolExecutor(1), torch.Generator().manual_seed(1)
        self.following = self.pool.submit(self.prepared)

    def prepared(self) -> torch.Tensor:
        time.sleep(0.02)
        return torch.randn(16, generator=self.generator)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        noise = self.following.result()
        self.following = self.pool.submit(self.prepared)
        self.x[index] += 0.1 * noise

    def seen(self) -> Any:
        return self.following.result().tolist(), self.generator.get_state().tolist()


def test_a_batch_that_a_pool_prepares_is_as_without_probes() -> None:
    check_as_without_probes(OneAhead)


class FromAQueue(Kind):
    """Another thread fills the queue that the step takes from."""

    def prepare(self) -> None:
        self.ready: queue.Queue[torch.Tensor] = queue.Queue(maxsize=2)
        self.stop = threading.Event()
        threading.Thread(target=self.fill, name="reader", daemon=True).start()

    def fill(self) -> None:
        while not self.stop.is_set():
            self.add(torch.randn(16))

    def add(self, noise: torch.Tensor) -> None:
        try:
            self.ready.put(noise, timeout=0.05)
        except queue.Full:
            return

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.x[index] += 0.1 * self.ready.get()


class Limited(FromAQueue):
    """It says by a semaphore how much there is."""

    def prepare(self) -> None:
        self.there = threading.Semaphore(0)
        super().prepare()

    def add(self, noise: torch.Tensor) -> None:
        self.there.release()
        self.stop.wait(0.01)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.there.acquire()


@pytest.mark.parametrize(("kind", "named"), [(FromAQueue, "ready .a Queue"), (Limited, "there .a Semaphore")])
def test_what_another_thread_fills_is_named_before_the_first_probe(kind: Any, named: str) -> None:
    job = kind()
    try:
        with script(PLAN), pytest.raises(RuntimeError, match=rf"{named}.: is filled by the thread 'reader'"):
            tuner_of(job).run()
        assert job.optimizer.state[next(job.model.parameters())]["step"] == 2  # those before the search
        job.data, taken = None, job.step
        job.step = lambda: taken(torch.arange(16))
        with pytest.raises(RuntimeError, match=f"{named}.: is filled by"):
            tuner_of(job)
    finally:
        job.stop.set()


class ToALog(Kind):
    """Another thread writes what the step says."""

    def prepare(self) -> None:
        self.lines: queue.Queue[float | None] = queue.Queue()
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def say(self, loss: float) -> None:
        self.lines.put(loss)

    def write(self) -> None:
        while self.lines.get() is not None:
            continue

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.say(loss.item())


class Lagging(ToALog):
    """The other thread is late: how much it has still to write differs from look to look."""

    def write(self) -> None:
        while self.lines.get() is not None:
            time.sleep(0.02)


@pytest.mark.parametrize("kind", [ToALog, Lagging], ids=lambda kind: kind.__name__)
def test_a_thread_that_takes_what_a_step_says_is_let_be(kind: type[ToALog]) -> None:
    job = kind()
    with script(PLAN):
        tuner = tuner_of(job)
        tuner.run()
    job.lines.put(None)
    job.thread.join(10)
    assert tuner.ledger.search.steps == 11


def test_an_iterator_that_reads_ahead_into_a_queue_is_seen_to_move() -> None:
    class Ahead(Iterator[int]):
        """As a package would have it."""

        def __init__(self) -> None:
            self.queue: queue.Queue[int] = queue.Queue()
            self.queue.put(1)

        def __next__(self) -> int:
            self.queue.put(self.queue.get() + 1)
            return 0

    ahead = Ahead()
    before = position(ahead)
    assert position(ahead) == before
    next(ahead)
    assert position(ahead) != before
