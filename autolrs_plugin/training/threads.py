"""Other threads of the user's: what they do in a probe is rolled back with it, which is told before it happens."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakSet

from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.slots import Slots, VariableSlots, names_in

logger = logging.getLogger("autolrs_plugin")

FILLS = {"put", "put_nowait", "acquire", "release"}
"""With what a thread changes one."""

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


def filled_by_threads(shared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path to each queue and semaphore that a running thread of the user's changes, with the thread's name.

    Args:
        shared: those of the job, by path.
    """
    paths = {id(thing): path for path, thing in shared.items() if not isinstance(thing, Future | Executor)}
    for thread in threading.enumerate() if paths else ():
        code = _code_of(thread)
        if code is None:
            continue
        found = Inventory({"": thread, "run": type(thread).run, **_given_to(thread)}, {})
        functions = [s.function.__code__ for s in found.slots.values() if isinstance(s, VariableSlots)]
        for thing in found.shared.values() if FILLS & _used_by(code, functions) else ():
            if id(thing) in paths:
                yield paths[id(thing)], thread.name


def check_threads(shared: Mapping[str, Any]) -> None:
    """See that no other thread prepares what a step takes: nobody can make it prepare that again.

    Raises:
        RuntimeError: one does; the message names it, and where its work is taken from.
    """
    for path, thread in filled_by_threads(shared):
        raise RuntimeError(
            f"{path} (a {type(shared[path]).__name__}): is filled by the thread {thread!r}, and what that adds while a "
            "probe runs would be lost, so the run would differ from one without probes. Give what batches are drawn "
            "from as train_data= (a DataLoader with num_workers reads ahead as well)."
        )


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


def _used_by(code: CodeType, functions: Iterable[CodeType]) -> set[str]:
    """Return the names that code uses, and that those of the functions use which it calls."""
    used: set[str] = set()
    fresh = set(names_in(code)[0])
    while fresh:
        used |= fresh
        called = {name for f in functions if f.co_name in fresh for name in names_in(f)[0]}
        fresh = called - used
    return used


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
    if isinstance(function, partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    code = function.__code__ if isinstance(function, FunctionType) else None
    return code if code is not None and is_users(code) else None
