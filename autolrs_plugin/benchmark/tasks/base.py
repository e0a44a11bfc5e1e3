"""What a reference task is: a problem to train, an optimizer, and who may learn from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; a target of IGNORED does not count."""

IGNORED = -100

DESIGN, JUDGING = "design", "judging"
"""The two roles of a task: constants are chosen by design tasks; judging tasks are only reported."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [..., classes]."""
    return functional.cross_entropy(
        outputs.reshape(-1, outputs.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED
    )


def unchanging(progress: float) -> None:
    """Change nothing on the way."""


@dataclass
class Problem:
    """A model with its data, ready to be trained.

    Attributes:
        model: maps inputs to outputs, which `criterion` takes.
        draw: draws a minibatch.
        validation: the fixed batches of the validation loss.
        criterion: the mean loss of outputs and targets.
        at: told before a piece of training how much of the run lies behind, in [0, 1]: a problem that changes on the
            way changes here, and changes back where it is told less.
    """

    model: nn.Module
    draw: Callable[[np.random.Generator], Batch]
    validation: list[Batch]
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    at: Callable[[float], None] = unchanging

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        inputs, targets = batch
        return self.criterion(self.model(inputs), targets)

    def validate(self) -> float:
        """Return the validation loss: the mean over all targets that count."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            counts = [float((targets != IGNORED).sum()) for _, targets in self.validation]
            losses = [float(self.loss(batch)) for batch in self.validation]
        self.model.train(training)
        return sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


class Lion(torch.optim.Optimizer):
    """Lion: steps by the sign of a mixture of gradient and momentum (Chen et al. 2023, program 1), without decay."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    def step(self, closure: None = None) -> None:
        """Take a step."""
        with torch.no_grad():
            for group in self.param_groups:
                mixed, kept = group["betas"]
                for p in (p for p in group["params"] if p.grad is not None):
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.add_(momentum.lerp(p.grad, 1 - mixed).sign_(), alpha=-group["lr"])
                    momentum.lerp_(p.grad, 1 - kept)


def _schedule_free(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    import schedulefree  # only one task needs it

    made = schedulefree.AdamWScheduleFree(parameters, lr=lr)
    made.train()
    return made


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD, momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "Lion": Lion,
    "Muon": lambda p, lr: torch.optim.Muon(p, lr=lr),
    "Schedule-Free AdamW": _schedule_free,
}


@dataclass(frozen=True)
class Task:
    """A reference task.

    Attributes:
        name: as `--task` takes it.
        steps: C, the training steps that each method has in all.
        build: makes a fresh problem for a seed (of the weights; data and split are fixed).
        kind: the optimizer, a key of OPTIMIZERS.
        default_lr: the learning rate of somebody who tunes nothing: the optimizer's default in torch, or the one that
            is published for such a model.
        grid: five learning rates that a practitioner would sweep; the best one must lie inside.
        role: DESIGN or JUDGING.
        clip: the norm to which gradients are clipped.
    """

    name: str
    steps: int
    build: Callable[[int], Problem]
    kind: str
    default_lr: float
    grid: tuple[float, ...]
    role: str = DESIGN
    clip: float = math.inf

    @property
    def sgd(self) -> bool:
        """Whether the optimizer is SGD of some kind."""
        return self.kind.startswith("SGD")

    def optimizer(self, problem: Problem, lr: float) -> torch.optim.Optimizer:
        """Return the task's optimizer on a problem's parameters."""
        return OPTIMIZERS[self.kind](problem.parameters(), lr)

    def step(self, problem: Problem, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
        """Take a training step on a minibatch; return its loss."""
        optimizer.zero_grad()
        loss = problem.loss(batch)
        loss.backward()
        if math.isfinite(self.clip):
            nn.utils.clip_grad_norm_(problem.parameters(), self.clip)
        optimizer.step()
        return float(loss.item())


def package_folder(package: str, install: str = "'vllm-sarathi[autolrs-bench]'") -> Path:
    """Return the folder of an installed package, without importing it; `install` is what pip would have to be told.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {install}", name=package)
    return Path(spec.submodule_search_locations[0])
