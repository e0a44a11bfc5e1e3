"""What a run needs of the Lightning Trainer that it is in: probes and evaluations."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from autolrs_plugin.training.attributes import PlainAttributes
from autolrs_plugin.training.data import ProbeBatches, generators_of
from autolrs_plugin.training.loop import as_number


class LightningHost:
    """Probes and evaluations in the midst of a Trainer's training."""

    def __init__(self, trainer: Any, module: Any, metric: str, sign: float) -> None:
        self._trainer, self._module, self._metric, self._sign = trainer, module, metric, sign
        loader = trainer.train_dataloader
        self._batches = ProbeBatches(loader, "train_dataloader", generators_of(loader))
        self._val_loop = trainer.fit_loop.epoch_loop.val_loop
        self._val_loop.setup_data()
        self.validates = self._val_loop._combined_loader is not None and not self._val_loop.skip

    def stateful(self) -> dict[str, Any]:
        """Return what else than the module changes in a probe."""
        loader, scaler = (
            self._trainer.train_dataloader,
            getattr(self._trainer.precision_plugin, "scaler", None),
        )
        # A DataLoader is copied for probes; a loader of the user's own that has a position is read ahead and rewound.
        positioned = not isinstance(loader, DataLoader) and hasattr(loader, "load_state_dict")
        sampler = getattr(loader, "sampler", None)
        found = {
            "loader": loader if positioned else None,
            "sampler": PlainAttributes(sampler) if sampler is not None else None,
            "scaler": scaler,
        }
        return {name: thing for name, thing in found.items() if thing is not None}

    @contextmanager
    def probing(self, seed: int) -> Iterator[Callable[[], Any]]:
        batches = self._batches.draw(seed)
        count = iter(range(2**62))
        with _deaf(self._trainer), _muted(self._module):
            yield lambda: self._step(batches, count)

    def _step(self, batches: Iterator[Any], count: Iterator[int]) -> Any:
        trainer, module = self._trainer, self._module
        if not module.automatic_optimization:
            return loss_of(self._forward(next(batches), next(count)))
        optimizer: Any = module.optimizers()
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            index = next(count)
            loss = loss_of(self._forward(next(batches), index), graph=True) / trainer.accumulate_grad_batches
            if not losses:
                module.optimizer_zero_grad(trainer.current_epoch, index, optimizer)
            losses.append(loss.detach().clone())
            trainer.strategy.backward(loss, optimizer)
            return loss

        while len(losses) < trainer.accumulate_grad_batches - 1:
            closure()
        module.optimizer_step(trainer.current_epoch, len(losses), optimizer, closure)
        return sum(losses)

    def _forward(self, batch: Any, index: int) -> Any:
        strategy, module = self._trainer.strategy, self._module
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = strategy.batch_to_device(
            module._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0
        )
        indexed = len(inspect.signature(module.training_step).parameters) > 1
        return strategy.training_step(batch, index) if indexed else strategy.training_step(batch)

    def evaluate(self) -> float:
        """Return the metric, smaller being better, from the Trainer's own validation loop."""
        trainer, loop, connector = self._trainer, self._val_loop, vars(self._trainer._logger_connector)
        progress = copy.deepcopy(loop.batch_progress)
        before = {
            name: copy.copy(value) if isinstance(value, dict) else value for name, value in connector.items()
        }
        try:
            with _deaf(trainer):
                trainer.validating = True
                metrics = {name: value for logged in loop.run() for name, value in logged.items()}
        finally:
            trainer.training = True
            connector.update(before)
            loop.batch_progress = progress
        if self._metric not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(f"metric={self._metric!r}: validation does not log it; it logs {logged}.")
        return self._sign * as_number(metrics[self._metric], "validation_step")


@contextmanager
def _deaf(trainer: Any) -> Iterator[None]:
    """Inside, neither loggers nor callbacks hear anything; the bar stays, for a thread of its own may draw it."""
    loggers, callbacks = trainer.loggers, trainer.callbacks
    trainer.loggers = [DummyLogger() for _ in loggers]
    trainer.callbacks = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """Inside, the module's `log` does nothing."""
    own = {name: vars(module).get(name) for name in ("log", "log_dict")}
    vars(module).update({name: lambda *args, **kwargs: None for name in own})
    try:
        yield
    finally:
        for name, value in own.items():
            vars(module).pop(name)
            if value is not None:
                vars(module)[name] = value


def loss_of(output: Any, graph: bool = False) -> Any:
    """Return the loss in what a training_step has returned, with its graph or without.

    Raises:
        ValueError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise ValueError("training_step: returned no loss; AutoLRS needs it, with manual optimisation, too.")
    return loss if graph else loss.detach()
