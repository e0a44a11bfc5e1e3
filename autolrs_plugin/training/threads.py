"""Other threads of the user's: what they set in a probe is rolled back with it, which is told before it happens."""

import logging
import threading
from collections.abc import Iterable
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakSet

from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.slots import Slots, names_in

logger = logging.getLogger("autolrs_plugin")

_told: WeakSet[threading.Thread] = WeakSet()


def warn_of_threads(slots: Iterable[Slots]) -> None:
    """Warn, once each, of threads whose function sets an attribute or a variable that has the name of one of the job's.

    What the functions set that it calls is not looked at, so no warning is no proof.
    """
    for thread in threading.enumerate():
        code = None if thread in (threading.current_thread(), *_told) else _code_of(thread)
        if code is None or not is_users(code) or not (sets := names_in(code)[1]):
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


def _code_of(thread: threading.Thread) -> CodeType | None:
    """Return the code that a thread was started with: of its class, of a timer, or what it was given."""
    function: Any = getattr(thread, "function", None) or getattr(thread, "_target", None)
    if type(thread).run not in (threading.Thread.run, threading.Timer.run):
        function = type(thread).run
    if isinstance(function, partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    return function.__code__ if isinstance(function, FunctionType) else None
