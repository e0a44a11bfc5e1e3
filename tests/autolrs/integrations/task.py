"""One small task for all frameworks: its model tells, in a buffer, which samples it was trained on, in order."""

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler

from autolrs_plugin.core.actions import Action, Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.state import Stage
from autolrs_plugin.training.sharded import reshard
from autolrs_plugin.training.tree import TensorCopy, local
from tests.autolrs.jobs import bits

RANGE = (1e-4, 1.0)
SAMPLES, BATCH, VALIDATION = 48, 8, 32

PROBING: tuple[Action, ...] = (
    Train(0, (0.05, 0.06)),
    Snapshot(),
    Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=True),
    Probe(0, 1, (0.01,) * 9, float("inf"), evaluate=True, draw=1),  # over the end of an epoch
    Restore(),
    Train(2, (0.05, 0.04, 0.03)),
    Evaluate(5),
    Snapshot(),
    Probe(1, 0, (0.5,) * 2, float("inf"), evaluate=False),
    Restore(),
    Train(5, (0.03, 0.02, 0.02, 0.01)),
    Evaluate(9),
)
"""Everything that a controller may ask of a hosted run; the real steps are those of RATES."""

RATES = (0.05, 0.06, 0.05, 0.04, 0.03, 0.03, 0.02, 0.02, 0.01)
STEPS = len(RATES)


class Net(nn.Module):
    """Two linear layers, with batch normalisation and dropout between, on 8x8 pictures."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 10)
        self.register_buffer("order", torch.full((20_000,), -1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            start = int(self.count)
            self.order[start : start + len(index)] = index
            self.count += len(index)
        logits = self.head(self.drop(torch.relu(self.norm(self.body(x)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def trained_on(self) -> list[int]:
        """Return the samples of the run, in order; those of a probe are rolled back with the buffer."""
        return self.order[: int(self.count)].tolist()


class Pictures(Dataset):
    """Pictures with their number, and with noise from three generators where asked for."""

    def __init__(self, size: int = SAMPLES, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(size, 64, generator=generator)
        self.labels = torch.randint(0, 10, (size,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = self.inputs[i]
        if self.noise:
            x = x + self.noise * (torch.randn(()) + random.random() + float(np.random.rand()))
        return {"x": x, "labels": self.labels[i], "index": torch.tensor(i)}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW whose second group has a tenth of the first one's rate."""
    groups = [
        {"params": [*model.body.parameters(), *model.norm.parameters()], "lr": 0.1},
        {"params": list(model.head.parameters()), "lr": 0.01},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def shard(model: nn.Module) -> None:
    """Spread a model over all processes (FSDP2)."""
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


class Counting(Sampler):
    """Another order in each iteration, by a count of its own."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        self.epoch += 1
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()


def loader(data: Pictures, batch: int = BATCH, own: str | None = None) -> DataLoader:
    """Return a loader that shuffles by the global generator, or by a `generator` or `sampler` of its own."""
    options: dict[str, Any] = {"shuffle": True}
    if own == "generator":
        options["generator"] = torch.Generator().manual_seed(3)
    elif own == "sampler":
        options = {"sampler": Counting(len(data))}
    return DataLoader(data, batch_size=batch, **options)


def validation() -> dict[str, torch.Tensor]:
    data = Pictures(VALIDATION)
    return {"x": data.inputs, "labels": data.labels, "index": torch.arange(VALIDATION)}


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


def snapshots_alive() -> int:
    """Return how many copies of tensors there are in the process."""
    gc.collect()
    return sum(type(thing) is TensorCopy for thing in gc.get_objects())


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        bits: every bit of the model and of the optimizer's state.
        trained_on: the samples, in order.
        steps: what the framework says it has taken.
        rates: the rates of all groups in each real step.
        logs: what the framework's loggers were told, without times.
        random: the state of all global generators at the end.
        snapshots: copies of tensors alive at each real step, and at the end.
        schedule: what the tuner found.
        search_steps: what it took.
        stages: its searches.
    """

    bits: dict[str, bytes]
    trained_on: list[int]
    steps: int
    rates: list[list[float]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    random: tuple[Any, ...] = ()
    snapshots: list[int] = field(default_factory=list)
    schedule: tuple[float, ...] = ()
    search_steps: int = 0
    stages: tuple[Stage, ...] = ()

    def take_over(self, tuner: Any) -> None:
        """Note what a tuner found."""
        self.schedule, self.search_steps = tuner.schedule.lrs, tuner.ledger.search.steps
        self.stages = tuner.stages


def all_bits(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    reshard(model)  # an evaluation leaves the gathered weights in place of the parameters
    values = dict(model.state_dict())
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state[parameter].items():
            values[f"state.{index}.{key}"] = torch.as_tensor(value)
    return {name: bits(local(value.detach())) for name, value in values.items()}


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def without_times(entry: dict[str, Any], times: Sequence[str] = ("runtime", "per_second")) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not k.endswith(tuple(times))}


class OneLayer(nn.Module):
    """A model as the Trainer wants it: it returns its loss with its answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}
