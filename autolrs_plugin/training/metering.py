"""A seam for measuring where a run's time goes; it costs next to nothing while nobody measures."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import ParamSpec, Protocol, TypeVar

from autolrs_plugin.core.actions import Action, Result, Train

P = ParamSpec("P")
R = TypeVar("R")


class Meter(Protocol):
    """Whoever measures."""

    def owning(self, owner: str) -> AbstractContextManager[None]:
        """Inside, time is spent by `owner`: `adapter` (AutoLRS beside training) or `action` (what it carries out)."""


_meter: ContextVar[Meter | None] = ContextVar("autolrs_meter", default=None)


@contextmanager
def metered_by(meter: Meter) -> Iterator[None]:
    """Inside, `meter` is told of what runs spend time on."""
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)


def owning(owner: str) -> AbstractContextManager[None]:
    """Inside, time is spent by `owner`."""
    meter = _meter.get()
    return nullcontext() if meter is None else meter.owning(owner)


def metered(owner: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return what makes the time in a function `owner`'s."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            with owning(owner):
                return function(*args, **kwargs)

        return measured

    return decorated


def owner_of(action: Action) -> str:
    """Return whose the time for an action, and for deciding after it, is."""
    return "adapter" if isinstance(action, Train) else "action"


def as_waited_for(result: Result, seconds: float) -> Result:
    """Return a result with the wall time that it was waited for, which is what a parallel probe costs."""
    share = min(1.0, seconds / result.seconds) if result.seconds else 1.0
    return replace(
        result,
        seconds=seconds,
        eval_seconds=result.eval_seconds * share,
        restore_seconds=result.restore_seconds * share,
    )
