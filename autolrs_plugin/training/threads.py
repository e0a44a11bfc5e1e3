"""Other threads of the user's: what they do in a probe is rolled back with it, which is told before it happens."""

import inspect
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from queue import Queue, SimpleQueue
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakSet

from autolrs_plugin.training.handed import (
    calls_in,
    check_channels,
    containers_in,
    filled_names,
    last_name,
    loads_in,
)
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.plain import CONTAINERS
from autolrs_plugin.training.slots import Slots, VariableSlots, names_in

logger = logging.getLogger("autolrs_plugin")

FILLS = {"put", "put_nowait", "acquire", "release"}
"""With what a thread changes one."""

TAKES, ADDS = {"get", "get_nowait"}, {"put", "put_nowait"}
"""With what something is taken from a queue, and put into it."""

PATIENCE_S = 60.0
"""How long is waited for what a thread of a pool prepares: one batch, mostly."""

_told: WeakSet[Any] = WeakSet()


def warn_of_threads(slots: Iterable[Slots]) -> None:
    """Warn, once each, of threads whose function sets an attribute or a variable that has the name of one of the job's.

    What the functions set that it calls is not looked at, so no warning is no proof.
    """
    for thread in threading.enumerate():
        code = None if thread in _told else _code_of(thread)
        if code is None or not (sets := names_in(code)[1]):
            continue
        held = {name.rpartition(".")[2] for s in slots if s.kind in ("user", "module") for name in s.get()}
        if sets := sets & held:
            _told.add(thread)
            logger.warning(
                "the thread %r sets %s: what it sets while a probe runs is taken back with it; let it set a "
                "threading.Event, which is not, and look at that after each step.",
                thread.name,
                ", ".join(sorted(sets)),
            )


@dataclass(frozen=True, slots=True)
class Worker:
    """A running thread of the user's.

    Attributes:
        name: of the thread.
        codes: its code, and that of the user's functions which it calls.
        used: the names that these use.
        found: what it reaches.
    """

    name: str
    codes: list[CodeType]
    used: set[str]
    found: Inventory


def workers() -> Iterator[Worker]:
    """Yield the running threads of the user's, but for the one that asks."""
    for thread in threading.enumerate():
        if (code := _code_of(thread)) is not None:
            found = Inventory({"": thread, "run": type(thread).run, **_given_to(thread)}, {})
            used, called = _used_by([code], found)
            yield Worker(thread.name, [code, *called], used, found)


def filled_by_threads(job: Inventory, running: Iterable[Worker]) -> Iterator[tuple[str, Any, str]]:
    """Yield what a running thread of the user's puts something into: the path to it, itself, and the thread's name.

    Args:
        job: what the job reaches: its queues, semaphores and containers are looked at.
        running: the threads.
    """
    shared = {id(t): (path, t) for path, t in job.shared.items() if not isinstance(t, Future | Executor)}
    held: dict[int, tuple[str, Any]] | None = None
    for worker in running:
        held = containers_in(job.slots) if held is None else held
        for thing in worker.found.shared.values() if FILLS & worker.used else ():
            if id(thing) in shared:
                yield *shared[id(thing)], worker.name
        filled = filled_names(worker.codes)
        for key, (path, _) in containers_in(worker.found.slots).items():
            if key in held and last_name(path) in filled:
                yield *held[key], worker.name


def check_threads(job: Inventory, step: Any) -> None:
    """See that no other thread or process prepares what a step takes: nobody can make it prepare that again.

    Args:
        job: what the job reaches.
        step: the function that takes a step; None where it is a framework's.

    Raises:
        RuntimeError: one does; the message names it, and where its work is taken from.
    """
    used, codes = _used_in_steps(job, step)
    check_channels(job.channels, codes)
    for path, thing, thread in filled_by_threads(job, workers()):
        if isinstance(thing, CONTAINERS) and last_name(path) not in used:
            continue
        raise RuntimeError(
            f"{path} (a {type(thing).__name__}): is filled by the thread {thread!r}, and what that adds while a "
            "probe runs would be lost, so the run would differ from one without probes. Give what batches are drawn "
            "from as train_data= (a DataLoader with num_workers reads ahead as well)."
        )


def owned_by_threads(job: Inventory, step: Any) -> list[Any]:
    """Return what is none of the job's state.

    Those are the containers that other threads fill and no step looks at, and the queues that they empty and to which
    steps only add: how much is in such a queue is a matter of when one looks.
    """
    running = list(workers())
    if not running:
        return []
    used, codes = _used_in_steps(job, step)
    owned = list(_emptied_by_threads(job, codes, running))
    for path, thing, _ in filled_by_threads(job, running):
        if isinstance(thing, CONTAINERS) and last_name(path) not in used:
            owned.append(thing)
    return owned


def _emptied_by_threads(
    job: Inventory, codes: Iterable[CodeType], running: Iterable[Worker]
) -> Iterator[Any]:
    """Yield the queues that a running thread of the user's takes from, and to which steps, of such code, only add."""
    looked_at = {name for code in codes for name, method in calls_in(code) if method not in ADDS}
    queues = {
        id(thing): thing
        for path, thing in job.shared.items()
        if isinstance(thing, Queue | SimpleQueue) and last_name(path) not in looked_at
    }
    for worker in running:
        taken = {name for code in worker.codes for name, method in calls_in(code) if method in TAKES}
        for path, thing in worker.found.shared.items():
            if id(thing) in queues and last_name(path) in taken:
                yield thing


def wait_for_pools(shared: Mapping[str, Any]) -> bool:
    """Wait until the futures of the job are done; tell whether it was waited, so that there may be more to see now.

    A thread that goes on drawing amid a look at the job, or after it was set back, would draw for two.
    """
    pending = {
        path: thing
        for path, thing in shared.items()
        if isinstance(thing, Future) and not thing.done() and thing not in _told
    }
    if pending:
        late = wait(pending.values(), PATIENCE_S).not_done
        for path in [path for path, thing in pending.items() if thing in late]:
            _told.add(pending[path])
            logger.warning(
                "%s: is not done after %.0f s, and is not waited for any more; what it changes while a probe runs is "
                "taken back with it.",
                *(path, PATIENCE_S),
            )
    return bool(pending)


def _functions_in(found: Inventory) -> list[tuple[str, CodeType]]:
    """Return the code of the user's functions that are reached, with the path to each."""
    functions = [(p.rstrip("'"), s) for p, s in found.slots.items() if isinstance(s, VariableSlots)]
    return [(path, slots.function.__code__) for path, slots in functions]


def _used_in_steps(job: Inventory, step: Any) -> tuple[set[str], list[CodeType]]:
    """Return the names that a step uses, and the code that it calls; of a framework's, that of the user's functions.

    A thread's own functions are none of a framework's steps, and what is only set is not used.
    """
    code = _code_in(step)
    if code is not None:
        used, called = _used_by([code], job)
        return used, [code, *called]
    threads = {own for thread in threading.enumerate() if (own := _code_of(thread)) is not None}
    codes = [code for _, code in _functions_in(job) if code not in threads]
    return {name for code in codes for name in loads_in(code)}, codes


def _used_by(codes: Iterable[CodeType], found: Inventory) -> tuple[set[str], list[CodeType]]:
    """Return the names that code uses, with those that the functions use which it calls; and the code of these."""
    functions = _functions_in(found)
    used: set[str] = set()
    called: list[CodeType] = []
    fresh = {name for code in codes for name in (*names_in(code)[0], *code.co_freevars)}
    while fresh:
        used |= fresh
        now = [code for path, code in functions if fresh & {code.co_name, last_name(path)}]
        called += now
        fresh = {name for code in now for name in (*names_in(code)[0], *code.co_freevars)} - used
    return used, called


def _given_to(thread: threading.Thread) -> dict[str, Any]:
    names = ("_target", "_args", "_kwargs", "function", "args", "kwargs")
    return {name: value for name in names if (value := getattr(thread, name, None)) is not None}


def _code_of(thread: threading.Thread) -> CodeType | None:
    """Return the user's code that another thread was started with: of its class, of a timer, or what it was given."""
    if thread is threading.current_thread():
        return None
    function: Any = getattr(thread, "function", None) or getattr(thread, "_target", None)
    if type(thread).run not in (threading.Thread.run, threading.Timer.run):
        function = type(thread).run
    return _code_in(function)


def _code_in(function: Any) -> CodeType | None:
    """Return the user's code that is called with a function, a method or an object; None where it is a library's."""
    if isinstance(function, partial):
        function = function.func
    if not isinstance(function, FunctionType | MethodType):
        function = getattr(type(function), "__call__", None)  # noqa: B004  # the function itself is wanted
    if isinstance(function, MethodType):
        function = function.__func__
    code = inspect.unwrap(function).__code__ if isinstance(function, FunctionType) else None
    return code if code is not None and is_users(code) else None
