"""Signals that come during a search: their handlers are called when the job is that of the real step again.

A handler of the user's sets a flag, or saves. In a probe the flag would be rolled back with it, and what is saved would
be the probe's. So a signal is held until the probe is undone, which the next step does: the search is left for it. What
the handler then changes is part of the state that the search goes back to.

Ctrl-C without a handler raises KeyboardInterrupt, as ever; only what cannot be begun again, deciding and writing down
what is decided, comes to its end before. Handlers are called in the main thread; where a job trains
in another one, or a handler is called at once because it may end a step that hangs (a timer's), it is told.
"""

import _signal  # what `signal` calls, and then looks at length for the member of an enum
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any

from autolrs_plugin.training.libraries import is_users

logger = logging.getLogger("autolrs_plugin")

Handler = Callable[[int, FrameType | None], Any]

HELD = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGCONT", "SIGBREAK")
"""What a cluster or a person asks a job with."""

TIMERS = ("SIGALRM", "SIGVTALRM", "SIGPROF")

_INTERRUPT = int(signal.SIGINT)


class Signals:
    """The signals of this process that somebody handles.

    Attributes:
        asked: whether one has come since the state was kept, so that the search is to be left.
        called: whether a handler was called since, which may have changed the job.
    """

    def __init__(self) -> None:
        self.asked = self.called = False
        self._depth, self._setting_back, self._whole = 0, False, False
        self._came: list[tuple[int, Handler]] = []
        self._told: set[str] = set()
        # Whose handlers are stood before: to ask for all of them takes as long as the rest.
        self._replaced: set[int] = set()
        names = [name for name in (*HELD, *TIMERS) if hasattr(signal, name)]  # not all are on each system
        self._numbers: dict[int, str] = {int(getattr(signal, name)): name for name in names}

    @contextmanager
    def held(self, watched_after: bool = False) -> Iterator[None]:
        """Inside, no handler is called; those whose signals came are called at the end, whatever ends it.

        Args:
            watched_after: whether to take note of handlers that are called later, until `unwatch`.
        """
        self.watch()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                if not watched_after:
                    self.unwatch()
                self._deliver()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, nothing that a signal brings cuts off what goes on: no handler, and no Ctrl-C without one.

        That raises KeyboardInterrupt at the end; a second one, of somebody who does not want to wait, at once.
        Inside of another one, the end is that one's.
        """
        main = threading.current_thread() is threading.main_thread()
        if main and self._whole:
            yield
            return
        watched = any(isinstance(_signal.getsignal(number), _Watched) for number in self._replaced)
        with self.held(watched_after=watched):
            if not main:
                yield
                return
            self._whole = True
            try:
                with self._interrupt_held():
                    yield
            finally:
                self._whole = False

    @contextmanager
    def _interrupt_held(self) -> Iterator[None]:
        if _signal.getsignal(_INTERRUPT) is not signal.default_int_handler:
            yield
            return
        came: list[int] = []

        def hold(number: int, frame: FrameType | None) -> None:
            came.append(number)
            if len(came) > 1:
                signal.default_int_handler(number, frame)

        _signal.signal(_INTERRUPT, hold)
        try:
            yield
        finally:
            _signal.signal(_INTERRUPT, signal.default_int_handler)
            if len(came) == 1:
                raise KeyboardInterrupt

    @contextmanager
    def setting_back(self) -> Iterator[None]:
        """Inside `held`, where a job is set back, a timer's handler, too, is called at the end: it may raise."""
        before, self._setting_back = self._setting_back, True
        try:
            yield
        finally:
            self._setting_back = before

    def watch(self) -> None:
        """From now on, stand before all handlers that there are now."""
        main = threading.current_thread() is threading.main_thread()
        for number, name in self._numbers.items():
            handler = _signal.getsignal(number)
            if (
                not callable(handler)
                or handler is signal.default_int_handler
                or isinstance(handler, _Watched)
            ):
                continue
            if main:
                signal.signal(number, _Watched(self, handler))
                self._replaced.add(number)
            elif is_users(_function_of(handler)):
                self._tell(
                    name,
                    "its handler is called in the main thread, and training goes on in another one: what it sets "
                    "during a search is taken back with a probe",
                )

    def unwatch(self) -> None:
        """Put the handlers back."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._replaced:
            if isinstance(watched := signal.getsignal(number), _Watched):
                signal.signal(number, watched.handler)
        self._replaced.clear()

    def forget(self) -> None:
        """Take note that the state is about to be kept: what has been asked for before it is in it."""
        self.asked = self.called = False

    def take(self, number: int, handler: Handler, frame: FrameType | None) -> None:
        """Take a signal that has come."""
        name = self._numbers[number]
        if name in TIMERS and not self._setting_back:
            handler(number, frame)
            if self._depth:  # it has not ended what went on
                self._tell(
                    name, "its handler is called at once, and what it sets in a probe is taken back with it"
                )
            return
        self.asked = self.asked or name not in TIMERS
        if self._depth:
            self._came.append((number, handler))
        else:
            self.called = True
            handler(number, frame)

    def _deliver(self) -> None:
        try:
            while self._came:
                number, handler = self._came.pop(0)
                self.called = True
                handler(number, sys._getframe())
        finally:
            if self._came:
                self._deliver()

    def _tell(self, name: str, what: str) -> None:
        if name not in self._told:
            self._told.add(name)
            logger.warning(
                "%s: %s; set a threading.Event, which is not, and look at it after each step.", name, what
            )


class _Watched:
    """Stands before a handler; in a process that was forked, a worker of a loader, it only calls it."""

    def __init__(self, signals: Signals, handler: Handler) -> None:
        self.handler = handler
        self._signals, self._process = signals, os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._signals.take(number, self.handler, frame)
        else:
            self.handler(number, frame)


def _function_of(handler: Any) -> Any:
    if isinstance(handler, MethodType):
        return handler.__func__
    return handler if hasattr(handler, "__name__") else type(handler)


SIGNALS = Signals()
"""Those of this process; there is one set of handlers in it."""
