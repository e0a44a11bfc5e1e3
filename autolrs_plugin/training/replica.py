"""Replica: another process's copy of a job, that carries out probes from the states that it is sent."""

from collections.abc import Callable, Mapping
from typing import Any

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.loop import TorchLoop
from autolrs_plugin.training.transaction import carry_out

BuildJob = Callable[[], Mapping[str, Any]]
"""Returns what AutoLRS takes of a job, as keyword arguments."""


class Replica:
    """A copy of a job; it never follows the run's stream of data."""

    def __init__(self, job: Job) -> None:
        self._loop = TorchLoop(job)
        self._loop.only_probe()

    def receive(self, state: bytes) -> None:
        """Make a state that `TorchLoop.kept_state` gave in another process the one that probes start from."""
        self._loop.receive(state)

    def probe(self, probe: Probe, seed: int) -> Result:
        """Carry out a probe; `seed` is the search's."""
        return carry_out(probe, self._loop, seed, lambda lr, loss: None)
