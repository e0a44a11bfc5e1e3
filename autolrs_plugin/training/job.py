"""What is trained, and how: the parts of a training job, as a user or a framework's adapter gives them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autolrs_plugin.training.data import Batches
from autolrs_plugin.training.inventory import Stateful
from autolrs_plugin.training.rng import Generator

TrainStep = Callable[..., Any]
"""Takes one optimizer step, given a batch or nothing, and returns its loss."""


@dataclass(frozen=True)
class Job:
    """The parts of a training job; those that are left out are not there. AutoLRS says what each is.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        train_step: takes a step; None where the framework or whoever drives takes it.
        validate: returns the validation loss.
        train_data: the batches for `train_step(batch)`.
        probe_data: other batches for probes.
        stateful: objects to roll back, by name.
        generators: random number generators beside the global ones and those of the data.
        count_tokens: returns the tokens (or samples) of a batch.
        keep: where the state to go back to is kept: `host` memory, `device` or `disk`.
        roots: more parts, by name, from which state may be reached: data sets, collators, functions.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train_step: TrainStep | None = None
    validate: Callable[[], Any] | None = None
    train_data: Batches | None = None
    probe_data: Batches | None = None
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    generators: Sequence[Generator] = ()
    count_tokens: Callable[[Any], int] | None = None
    keep: str = "host"
    roots: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        data: Stateful | None = None,
        scaler: Stateful | None = None,
        scheduler: Stateful | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        **others: Any,
    ) -> "Job":
        """Return a job from AutoLRS's own arguments, of which some are `stateful` by their names."""
        own = {"scaler": scaler, "scheduler": scheduler, "data": data}
        given = {name: thing for name, thing in own.items() if thing is not None}
        return cls(model, optimizer, stateful={**given, **(stateful or {})}, **others)

    def parts(self) -> dict[str, Any]:
        """Return, by name, the parts that are there and from which state may be reached."""
        own = {name: getattr(self, name) for name in ("train_step", "validate", "train_data", "probe_data")}
        return {name: part for name, part in {**own, **self.roots}.items() if part is not None}
