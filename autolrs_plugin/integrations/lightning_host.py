"""What a run needs of the Lightning Trainer that it is in: probes and evaluations."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from autolrs_plugin.integrations.lightning_package import DummyLogger, ProgressBar
from autolrs_plugin.training.data import ProbeBatches, generators_of, without_workers
from autolrs_plugin.training.hosted import saved_by
from autolrs_plugin.training.loop import as_number
from autolrs_plugin.training.slots import Slots

MOST_SKIPPED = 100
"""Most batches that may be skipped in a row."""


class LoaderSlots(Slots):
    """The loaders that an evaluation loop has now: Lightning may make them anew between epochs."""

    def __init__(self, loop: Any) -> None:
        super().__init__(loop, "data")

    def get(self) -> dict[str, Any]:
        """Return the loaders."""
        combined = self._owner._combined_loader
        return {} if combined is None else {f"[{i}]": loader for i, loader in enumerate(combined.flattened)}

    def set(self, name: str, value: Any) -> None:
        """Leave it: which loaders there are is Lightning's."""

    def delete(self, name: str) -> None:
        """Leave it."""


class LightningHost:
    """Probes and evaluations during a Trainer's training."""

    def __init__(self, trainer: Any, module: Any, metric: str, sign: float) -> None:
        self._trainer, self._module, self._metric, self._sign = trainer, module, metric, sign
        self._combined = trainer.fit_loop._combined_loader
        self.loaders = list(self._combined.flattened)
        if len(self.loaders) > 1 and self._combined._mode == "sequential":
            raise ValueError(
                "train_dataloader: a CombinedLoader in the mode 'sequential' gives one loader after the other, so a "
                "probe would see the first alone; use 'max_size_cycle', 'min_size' or 'max_size'."
            )
        self.generators = [generator for loader in self.loaders for generator in generators_of(loader)]
        self._batches = [ProbeBatches(loader, "train_dataloader", self.generators) for loader in self.loaders]
        self._val_loop = trainer.fit_loop.epoch_loop.val_loop
        self.validates = bool(trainer.enable_validation)
        if self.validates:
            self._val_loop.setup_data()
            self.validates = self._val_loop._combined_loader is not None and not self._val_loop.skip

    def stateful(self) -> dict[str, Any]:
        """Return what else than the module and what `roots` has changes in a probe."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return {} if scaler is None else {"scaler": scaler}

    def roots(self) -> dict[str, Any]:
        """Return what else than the module has state that a probe or an evaluation may change."""
        return {
            "strategy.model": self._trainer.strategy.model,
            "train_dataloader": self.loaders,
            "val_dataloader": LoaderSlots(self._val_loop),
            "datamodule": self._trainer.datamodule,
        }

    @contextmanager
    def saving(self, as_kept: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Inside, a checkpoint that is asked for is made inside of `as_kept()`, with the state of all callbacks."""
        trainer = self._trainer
        real = trainer.loggers, trainer.callbacks

        @contextmanager
        def heard() -> Iterator[None]:
            now = trainer.loggers, trainer.callbacks
            trainer.loggers, trainer.callbacks = real
            try:
                with as_kept():
                    yield
            finally:
                trainer.loggers, trainer.callbacks = now

        with saved_by(trainer, "save_checkpoint", heard):
            yield

    @contextmanager
    def probing(self, seed: int) -> Iterator[Callable[[], Any]]:
        batches = self._drawn(seed)
        count = iter(range(2**62))
        with _deaf(self._trainer), _muted(self._module):
            yield lambda: self._step(batches, count)

    def _drawn(self, seed: int) -> Iterator[Any]:
        streams = [batches.draw(seed) for batches in self._batches]
        while True:
            yield tree_unflatten([next(stream) for stream in streams], self._combined._spec)

    def _step(self, batches: Iterator[Any], count: Iterator[int]) -> Any:
        trainer, module = self._trainer, self._module
        if not module.automatic_optimization:
            return loss_of(self._forward_with_loss(batches, count))
        optimizer: Any = module.optimizers()
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            output = self._forward_with_loss(batches, count)
            loss = loss_of(output, graph=True) / trainer.accumulate_grad_batches
            if not losses:
                module.optimizer_zero_grad(trainer.current_epoch, 0, optimizer)
            losses.append(loss.detach().clone())
            trainer.strategy.backward(loss, optimizer)
            return loss

        while len(losses) < trainer.accumulate_grad_batches - 1:
            closure()
        module.optimizer_step(trainer.current_epoch, len(losses), optimizer, closure)
        return sum(losses)

    def _forward_with_loss(self, batches: Iterator[Any], count: Iterator[int]) -> Any:
        """Return what training_step returns, from the next batch that it does not skip by returning None."""
        for _ in range(MOST_SKIPPED):
            output = self._forward(next(batches), next(count))
            if loss_of(output) is not None:
                return output
        raise ValueError(
            f"training_step: returned None for {MOST_SKIPPED} batches in a row, so nothing is trained."
        )

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
        trainer, connector = self._trainer, vars(self._trainer._logger_connector)
        before = {
            name: copy.copy(value) if isinstance(value, dict) else value for name, value in connector.items()
        }
        validated_at = {name: at for name, at in vars(trainer).items() if name == "_last_val_time"}
        try:
            with _deaf(trainer), self._passing_loop() as loop:
                trainer.validating = True
                metrics = {name: value for logged in loop.run() for name, value in logged.items()}
        finally:
            trainer.training = True
            vars(trainer).update(validated_at)
            connector.update(before)
        if self._metric not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(f"metric={self._metric!r}: validation does not log it; it logs {logged}.")
        return self._sign * as_number(metrics[self._metric], "validation_step")

    @contextmanager
    def _passing_loop(self) -> Iterator[Any]:
        """Yield the validation loop with loaders whose workers, if any, end with them; afterwards it is as before."""
        loop = self._val_loop
        kept = {**vars(loop), "batch_progress": copy.deepcopy(loop.batch_progress)}
        kept["_seen_batches_per_dataloader"] = copy.copy(loop._seen_batches_per_dataloader)
        if loop._combined_loader is not None:
            loop._combined_loader = copy.copy(loop._combined_loader)
            loop._combined_loader.flattened = [
                without_workers(loader) for loader in loop._combined_loader.flattened
            ]
        try:
            yield loop
        finally:
            if loop._data_fetcher is not kept["_data_fetcher"]:
                loop._data_fetcher.teardown()
            vars(loop).clear()
            vars(loop).update(kept)


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
    """Return the loss in what a training_step has returned, with its graph or without; None if it skipped the batch.

    Raises:
        ValueError: there is none.
    """
    if output is None or output == {}:
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise ValueError("training_step: returned no loss; AutoLRS needs it, with manual optimisation, too.")
    return loss if graph else loss.detach()
