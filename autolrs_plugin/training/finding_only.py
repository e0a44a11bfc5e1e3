"""A training script that is run only to find a learning rate: see `autolrs find`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.finding import Finding

_share: ContextVar[float | None] = ContextVar("autolrs_share_to_find", default=None)


class FoundError(Exception):
    """Ends a script that was started only to find a learning rate.

    Attributes:
        finding: what was found out.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@contextmanager
def finding_only(share: float) -> Iterator[None]:
    """Inside, every tuner that is made finds a learning rate in place of training, and raises FoundError with it.

    Args:
        share: the steps that it may take, as a fraction of the run's.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def share_to_find() -> float | None:
    """Return the share of the steps that a tuner made now may only find with; None where it is to train."""
    return _share.get()


def to_find(config: AutoLRSConfig, share: float) -> AutoLRSConfig:
    """Return the settings of a run that finds a rate with a share of the steps of `config`, and trains nothing."""
    return replace(config, mode="find", search_budget=share, warm_start=None)
