"""What a run needs of the transformers Trainer that it is in: probes, evaluations and losses."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch

from autolrs_plugin.integrations.accelerate import gradients_kept, probe_batches
from autolrs_plugin.training.data import without_workers
from autolrs_plugin.training.hosted import saved_by
from autolrs_plugin.training.libraries import SKIPPED
from autolrs_plugin.training.slots import Slots

MACHINERY = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "peft",
    "tokenizers",
    "transformers",
    "trl",
    *SKIPPED,
}
"""Packages whose objects in a Trainer are not the user's."""

LEFT = ("model", "model_wrapped", "train_dataset", "eval_dataset", "training_step", "create_scheduler")
"""Attributes of a Trainer that are parts of the job by themselves, or ours."""

NOT_METRICS = ("_runtime", "_per_second", "epoch", "step", "_time")


class TrainerSlots(Slots):
    """What a Trainer counts and keeps, and what a user's own one has beside that: a teacher, objects, functions."""

    whole = True

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer, "user", LEFT)

    def get(self) -> dict[str, Any]:
        """Return the attributes."""
        return {name: value for name, value in super().get().items() if self._is_own(value)}

    def _is_own(self, value: Any) -> bool:
        if isinstance(value, MethodType) and value.__self__ is self._owner:
            return False
        package = type(value).__module__.partition(".")[0]
        return isinstance(value, torch.nn.Module) or package not in MACHINERY


class TrainerHost:
    """Probes and evaluations during a Trainer's training."""

    def __init__(self, trainer: Any, measures: bool, metric: str, sign: float) -> None:
        self._trainer, self._metric, self._sign, self._measures = trainer, metric, sign, measures
        self._training_step, self._was_patched = trainer.training_step, "training_step" in vars(trainer)
        self._losses: list[torch.Tensor] = []

    def record(self) -> None:
        """From here on, note the losses of the Trainer's own steps: it tells callbacks none, and filters NaN."""
        step, losses = self._training_step, self._losses

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(step(*args, **kwargs))
            return losses[-1]

        self._trainer.training_step = training_step

    def release(self) -> None:
        """Note no more losses."""
        vars(self._trainer).pop("training_step", None)
        if self._was_patched:
            self._trainer.training_step = self._training_step

    def recorded_loss(self) -> Any:
        """Return the loss of the optimizer step that has been taken."""
        loss = self._told(sum(self._losses))
        self._losses.clear()
        return loss

    def _told(self, loss: Any) -> Any:
        # A loss that measures nothing can still tell that training has broken down.
        return loss if self._measures else 0.0 * loss

    def roots(self) -> dict[str, Any]:
        """Return what else than the model has state that a probe may change."""
        trainer = self._trainer
        return {
            "model_wrapped": trainer.model_wrapped,
            "train_dataset": trainer.train_dataset,
            "data_collator": trainer.data_collator,
            "eval_dataset": trainer.eval_dataset,
            "class": type(trainer),
            "trainer": TrainerSlots(trainer),
        }

    @contextmanager
    def saving(self, as_kept: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Inside, a checkpoint that is asked for is made inside of `as_kept()`, and heard of by all callbacks."""
        trainer, handler = self._trainer, self._trainer.callback_handler
        real = trainer.state, trainer.control, handler.callbacks

        @contextmanager
        def unmuted() -> Iterator[None]:
            now = trainer.state, trainer.control, handler.callbacks
            trainer.state, trainer.control, handler.callbacks = real
            try:
                with as_kept():
                    trainer.state, trainer.control, handler.callbacks = real
                    yield
            finally:
                trainer.state, trainer.control, handler.callbacks = now

        with saved_by(trainer, "_save_checkpoint", unmuted), saved_by(trainer, "save_model", as_kept):
            yield

    @contextmanager
    def probing(self, seed: int) -> Iterator[Callable[[], Any]]:
        loader = self._loader()
        with _muted(self._trainer), probe_batches(self._trainer.accelerator, loader, seed) as batches:
            yield lambda: self._step(batches)

    def _loader(self) -> Any:
        """Return a loader of the Trainer's for one probe, and not the run's own."""
        with self._passing_loaders():
            return without_workers(self._trainer.get_train_dataloader())

    @contextmanager
    def _passing_loaders(self) -> Iterator[None]:
        """Inside, the Trainer makes loaders that are not the run's own: their workers, if any, end with them."""
        args, made = self._trainer.args, self._trainer.accelerator._dataloaders
        persistent, known = args.dataloader_persistent_workers, len(made)
        args.dataloader_persistent_workers = False
        try:
            yield
        finally:
            args.dataloader_persistent_workers = persistent
            del made[known:]

    def _step(self, batches: Iterator[Any]) -> Any:
        trainer, args, accelerator = self._trainer, self._trainer.args, self._trainer.accelerator
        model = trainer.model_wrapped
        samples, items = trainer.get_batch_samples(batches, args.gradient_accumulation_steps, args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        losses = []
        for i, inputs in enumerate(samples):
            last = i == len(samples) - 1
            accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else accelerator.no_sync(model):
                losses.append(self._training_step(model, inputs, items))
        if args.max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()
        return self._told(sum(losses))

    def evaluate(self) -> float:
        """Return the metric, smaller being better."""
        trainer = self._trainer
        with _muted(trainer) as state, self._passing_loaders(), gradients_kept(trainer.accelerator):
            metrics = trainer.evaluate()
            for logged in state.log_history:  # TRL adds its own when it logs
                metrics = {**logged, **metrics}
        if self._metric not in metrics:
            names = [n for n in metrics if not n.endswith(NOT_METRICS)]
            raise ValueError(
                f"metric={self._metric!r}: evaluation does not produce it; it gives {', '.join(sorted(names))}."
            )
        return self._sign * float(metrics[self._metric])


@contextmanager
def _muted(trainer: Any) -> Iterator[Any]:
    """Inside, no callback hears anything, and the Trainer's state and control are copies; yield that state."""
    handler, state, control = trainer.callback_handler, trainer.state, trainer.control
    callbacks, eval_dataloader = handler.callbacks, handler.eval_dataloader
    handler.callbacks = []
    trainer.state, trainer.control = copy.copy(state), copy.copy(control)
    trainer.state.log_history = []
    try:
        yield trainer.state
    finally:
        trainer.state, trainer.control = state, control
        handler.callbacks, handler.eval_dataloader = callbacks, eval_dataloader
