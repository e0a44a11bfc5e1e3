"""A seam for measuring where a run's time goes; it costs next to nothing while nobody measures."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, Protocol, TypeVar

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
