"""Replica: another process's copy of a job, that carries out probes from the states that it is sent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.training.loop import TorchLoop, named_state
from autolrs_plugin.training.transaction import carry_out

BuildJob = Callable[[], Mapping[str, Any]]
"""Returns what AutoLRS takes of a job, as keyword arguments."""


class Replica:
    """A copy of a job, built from AutoLRS's own arguments; it never follows the run's stream of data."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_step: Callable[..., Any],
        validate: Callable[[], Any] | None = None,
        train_data: Any = None,
        probe_data: Any = None,
        data: Any = None,
        scaler: Any = None,
        scheduler: Any = None,
        stateful: Mapping[str, Any] | None = None,
        generators: Sequence[Any] = (),
        count_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        self._loop = TorchLoop(
            model,
            optimizer,
            train_step,
            validate,
            train_data,
            probe_data,
            named_state(scaler, scheduler, data, stateful),
            generators,
            count_tokens,
            keep="host",
        )
        self._loop.only_probe()

    def receive(self, state: bytes) -> None:
        """Make a state that `TorchLoop.kept_state` gave in another process the one that probes start from."""
        self._loop.receive(state)

    def probe(self, probe: Probe, seed: int) -> Result:
        """Carry out a probe; `seed` is the search's."""
        return carry_out(probe, self._loop, seed, lambda lr, loss: None)
