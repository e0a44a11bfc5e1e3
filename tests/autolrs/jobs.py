"""Small real training jobs for the tests: a model, an optimizer, data, and a step."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Lion(torch.optim.Optimizer):
    """A sign optimizer whose state appears at its first step, with a count kept outside `state`."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.updates = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        self.updates += 1
        for group in self.param_groups:
            group["d"] = group.get("d", 1.0) * 1.01  # an estimate in the group, as Prodigy keeps one
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                a, b = group["betas"]
                update = (momentum * a + p.grad * (1 - a)).sign()
                p.add_(update, alpha=-group["lr"] / (1 + 0.01 * self.updates) * group["d"])
                momentum.mul_(b).add_(p.grad, alpha=1 - b)


def transformers_adafactor(params: Iterable[Any]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor  # seconds to import

    return Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=True)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adam-capturable-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor-transformers": transformers_adafactor,
    "lion": lambda p: Lion(p, lr=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


class Net(nn.Module):
    """A convolution, batch normalisation, dropout and two linear layers on 8x8 pictures."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Linear(256, 16)
        self.out = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(self.drop(torch.relu(self.hidden(x.flatten(1)))))


@dataclass
class Job:
    """A job whose data is drawn from torch's global generator."""

    optimizer_name: str = "momentum"
    dtype: torch.dtype = torch.float32
    micro_batches: int = 1
    seed: int = 0
    groups: bool = True
    scheduler: Any = None
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = Net().to(self.dtype)
        self.inputs = torch.randn(64, 1, 8, 8, dtype=self.dtype)
        self.targets = torch.randint(0, 10, (64,))
        head = list(self.model.out.parameters())
        body = [p for p in self.model.parameters() if not any(p is h for h in head)]
        params: Any = [{"params": body}, {"params": head}] if self.groups else self.model.parameters()
        self.optimizer = OPTIMIZERS[self.optimizer_name](params)

    def step(self) -> torch.Tensor:
        """Take one optimizer step on a batch drawn from the global generator; return its loss."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for _ in range(self.micro_batches):
            index = torch.randint(0, 64, (16,))
            logits = self.model(self.inputs[index])
            loss = nn.functional.cross_entropy(logits.float(), self.targets[index]) / self.micro_batches
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total

    def validate(self) -> float:
        """Return the loss on all data, with dropout off."""
        self.model.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(self.model(self.inputs).float(), self.targets)
        self.model.train()
        return loss.item()

    def bits(self) -> dict[str, bytes]:
        """Return every bit of the weights, buffers and optimizer state, by name."""
        values = dict(self.model.state_dict())
        for index, parameter in enumerate(p for g in self.optimizer.param_groups for p in g["params"]):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                values[f"state.{index}.{key}"] = torch.as_tensor(-1.0 if value is None else value)
        for index, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, float | torch.Tensor):
                    values[f"group.{index}.{key}"] = torch.as_tensor(value)
        return {k: bits(v) for k, v in values.items()}


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Noisy(Dataset):
    """Pictures with noise from three generators: an augmentation, drawn where the loader runs."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(()) + random.random() + float(np.random.rand())
        return self.job.inputs[i] + 0.1 * noise, self.job.targets[i]


def loader(job: Job, **options: Any) -> DataLoader:
    return DataLoader(Noisy(job), batch_size=16, **({"shuffle": True} | options))


def batch_step(job: Job) -> Callable[[Any], torch.Tensor]:
    def step(batch: Any) -> torch.Tensor:
        inputs, targets = batch
        job.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(job.model(inputs), targets)
        loss.backward()
        job.optimizer.step()
        return loss

    return step


def outside(value: Any) -> Any:
    """Return what holds a value as `held` where no rollback sets it back: nobody looks for a job's state in a Mock."""
    return Mock(held=value)
