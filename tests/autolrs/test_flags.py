"""Locks, events and barriers: set back where this thread is alone, and told of where another may have set them."""

import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from autolrs_plugin.training.flags import times_held
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, everything, plainly, tuner_of
from tests.autolrs.test_reach import drawing, held_by

ONES = torch.ones(2)


def a_lock() -> Any:
    lock = threading.Lock()

    def use() -> Any:
        return (5.0 if lock.acquire(blocking=False) else 1.0), ONES

    return use


def a_lock_each_other_time() -> Any:
    lock = threading.Lock()

    def use() -> Any:
        if lock.locked():
            lock.release()
            return 1.0, ONES
        lock.acquire()
        return 5.0, ONES

    return use


def a_lock_that_is_taken_again() -> Any:
    lock = threading.RLock()

    def use() -> Any:
        lock.acquire()
        return float(times_held(lock)), ONES

    return use


def a_barrier() -> Any:
    barrier = threading.Barrier(1)

    def use() -> Any:
        if barrier.broken:
            return 1.0, ONES
        barrier.abort()
        return 5.0, ONES

    return use


@pytest.mark.parametrize("make", [a_lock, a_lock_each_other_time, a_lock_that_is_taken_again, a_barrier])
def test_what_this_thread_alone_has_locked_is_as_without_probes(make: Callable[[], Any]) -> None:
    if threading.active_count() > 1:
        pytest.skip("another test has left a thread")
    torch.manual_seed(0)
    whole = plainly(held_by("Job", make())())
    torch.manual_seed(0)
    job = held_by("Job", make())()
    with script(PLAN):
        tuner_of(job).run()
    assert everything(job) == whole


@contextmanager
def beside_a_thread(work: Callable[[threading.Event], object] = threading.Event.wait) -> Iterator[None]:
    """Let another thread work until the end; it is given what tells it of that."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", [threading.Event, threading.Lock, multiprocessing.Event])
def test_what_another_thread_or_process_may_have_set_stays_and_is_told(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flag, calls = kind(), [0]

    def draw() -> None:
        calls[0] += 1
        if calls[0] == 3:  # of the first probe
            flag.set() if hasattr(flag, "set") else flag.acquire(blocking=False)

    with script(PLAN), caplog.at_level(logging.WARNING, "autolrs_plugin"), beside_a_thread():
        tuner_of(drawing(draw)).run()
    (warning,) = [text for text in caplog.messages if "was set or let go in a probe, and stays so" in text]
    assert "flag (" in warning


def test_a_lock_that_another_thread_holds_for_a_moment_is_let_be(caplog: pytest.LogCaptureFixture) -> None:
    lock, stop = threading.Lock(), threading.Event()

    def often() -> None:
        while not stop.is_set():
            with lock:
                stop.wait(0.001)
            stop.wait(0.0005)

    thread = threading.Thread(target=often)
    thread.start()

    def draw() -> None:
        with lock:
            return

    try:
        with script(PLAN), caplog.at_level(logging.WARNING, "autolrs_plugin"):
            tuner_of(drawing(draw)).run()
    finally:
        stop.set()
        thread.join()
    assert not [text for text in caplog.messages if "a flag" in text]
