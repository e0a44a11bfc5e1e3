"""AutoLRS in a transformers Trainer, and in the trainers of TRL that build on it."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from autolrs_plugin.training.attributes import PlainAttributes, kept
from autolrs_plugin.training.hosted import HostedLoop, HostedResults, HostedRun, check_begin, hosted_config
from autolrs_plugin.training.lr import TunedLR
from autolrs_plugin.training.progress import StageLines, StageLog
from autolrs_plugin.training.rng import Generator
from autolrs_plugin.training.snapshot import Stateful

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS in a Trainer: needs transformers and accelerate ({error}): "
        "pip install 'vllm-sarathi[transformers]'",
        name="transformers",
    ) from error

LEARN_FROM_REWARDS = {
    *("GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer", "XPOTrainer", "NashMDTrainer"),
    *("AsyncGRPOTrainer", "GMPOTrainer", "A2POTrainer"),
}
"""Trainers of TRL whose loss is no measure of progress."""

NOT_METRICS = ("_runtime", "_per_second", "epoch", "step", "_time")


class AutoLRSCallback(TrainerCallback, ExportableState, HostedResults):  # type: ignore[misc]
    """Finds the learning rate while a Trainer trains: `Trainer(..., callbacks=[AutoLRSCallback((1e-6, 1e-2))])`.

    A search takes place before a step, on batches that the Trainer's own dataloader gives anew, and is rolled back bit
    for bit: `global_step`, the order of the training batches and the logs are what they would be without. Works with
    PEFT, gradient accumulation and checkpointing, mixed precision, evaluation, early stopping and
    `resume_from_checkpoint` (its state is in each checkpoint's trainer_state.json). Give it to the Trainer's
    constructor.

    Args:
        lr_range: the least and the greatest learning rate to try, of the first parameter group.
        search_budget: the steps that the search may take, as a fraction of the run's, in (0, 1].
        seed: of everything that the search draws.
        metric: what to decide by, as `trainer.evaluate()` names it; needs an eval_dataset. None for `eval_loss`, or
            for the training loss where there is no eval_dataset.
        greater_is_better: whether the metric grows with progress; None for: unless its name ends in `loss`.
        loss_is_progress: whether the training loss measures progress; without, a metric is needed. None for: except
            in TRL's trainers that learn from rewards.
        generators: random number generators beside the global ones that data or model draw from.
        stateful: more objects to roll back, by name.
        keep: where the state to go back to is kept: `host` memory, `device` or `disk`.
        progress: whether to print a line per search; it is logged (`autolrs_plugin`) without.
        settings: the other settings of AutoLRSConfig.

    Raises:
        ConfigError: a setting that cannot be used. What cannot be tuned in the Trainer is refused when the Trainer is
            constructed, or before its first step.
    """

    def __init__(
        self,
        lr_range: tuple[float, float],
        *,
        search_budget: float = 0.25,
        seed: int = 0,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        loss_is_progress: bool | None = None,
        generators: Sequence[Generator] = (),
        stateful: Mapping[str, Stateful] | None = None,
        keep: str = "host",
        progress: bool = True,
        **settings: Any,
    ) -> None:
        self._settings = {"lr_range": lr_range, "search_budget": search_budget, "seed": seed, **settings}
        hosted_config("AutoLRSCallback", 1, False, self._settings)
        greater = not (metric or "loss").endswith("loss") if greater_is_better is None else greater_is_better
        self._metric, self._sign = metric, -1.0 if greater else 1.0
        self._loss_is_progress = loss_is_progress
        self._generators, self._stateful, self._keep = tuple(generators), dict(stateful or {}), keep
        self._observer = StageLines() if progress else StageLog()
        self._host: _Host | None = None

    def state(self) -> dict[str, Any]:
        """Return the run so far, which the Trainer writes into each checkpoint."""
        return {"args": self._settings, "attributes": {"journal": self.run.state()} if self.run else {}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the Trainer that is being constructed, and give it a scheduler that tells the rates in use."""
        trainer = _calling_trainer()
        _check_trainer(trainer, self._metric, self._measures(trainer))
        trainer.create_scheduler = lambda *args, **kwargs: _install_scheduler(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run, or go on with the one in the checkpoint."""
        trainer = _calling_trainer()
        self._release()  # a run before may have ended in an error
        saved = (state.stateful_callbacks.get(type(self).__name__) or {}).get("attributes", {}).get("journal")
        check_begin("AutoLRSCallback", state.global_step, saved, self.run)
        if not isinstance(trainer.lr_scheduler, TunedLR):
            _check_trainer(trainer, self._metric, self._measures(trainer))
            _install_scheduler(trainer)
        if state.is_hyper_param_search:
            raise ValueError("hyperparameter_search: AutoLRS finds the learning rate within one run; use one.")
        host = _Host(trainer, self._measures(trainer), self._metric or "eval_loss", self._sign)
        validates = trainer.eval_dataset is not None
        config = hosted_config("AutoLRSCallback", state.max_steps, validates, self._settings)
        stateful = {"trainer": host.attributes, **self._stateful}
        if trainer.accelerator.scaler is not None:
            stateful["scaler"] = trainer.accelerator.scaler
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        loop = HostedLoop(trainer.model, optimizer, host, stateful, self._generators, self._keep)
        self.run = HostedRun(config, loop, saved, state.global_step, [self._observer])
        if self._metric is not None and saved is None:
            loop.evaluate()  # an unknown metric shows before any training
        self._host = host
        host.record()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Search if a search is due, and set the step's learning rate."""
        if self._host is None or self.run is None:
            raise RuntimeError(
                "AutoLRSCallback: was added to a Trainer that has already started; give it to the constructor: "
                "Trainer(..., callbacks=[AutoLRSCallback(...)])."
            )
        self.run.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's loss."""
        assert self.run is not None
        assert self._host is not None
        self.run.after_step(self._host.recorded_loss())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the Trainer's objects."""
        self._release()

    def _measures(self, trainer: Trainer) -> bool:
        names = {c.__name__ for c in type(trainer).__mro__}
        return not names & LEARN_FROM_REWARDS if self._loss_is_progress is None else self._loss_is_progress

    def _release(self) -> None:
        if self._host is not None and self.run is not None:
            self._host.release()
            self.run.close()
        self._host = None


class _Host:
    """Probes and evaluations in the midst of a Trainer's training."""

    def __init__(self, trainer: Trainer, measures: bool, metric: str, sign: float) -> None:
        self.attributes = PlainAttributes(trainer, leave=("train_dataset", "eval_dataset"))
        self._trainer, self._metric, self._sign, self._measures = trainer, metric, sign, measures
        self._training_step = trainer.training_step
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

    def recorded_loss(self) -> Any:
        """Return the loss of the optimizer step that has been taken."""
        loss = self._told(sum(self._losses))
        self._losses.clear()
        return loss

    def _told(self, loss: Any) -> Any:
        # A loss that measures nothing can still tell that training has broken down.
        return loss if self._measures else 0.0 * loss

    @contextmanager
    def probing(self, seed: int) -> Iterator[Callable[[], Any]]:
        """Return a function that takes one optimizer step as the Trainer does, on batches of its own dataloader."""
        trainer, gradients = self._trainer, self._trainer.accelerator.gradient_state
        sync = gradients.sync_gradients
        loader = trainer.get_train_dataloader()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(seed % 2**31)  # a seedable sampler does not look at the global generators
        batches = _endless(loader)
        with _muted(trainer):
            try:
                yield lambda: self._step(batches)
            finally:
                batches.close()
                gradients._remove_dataloader(loader)
                gradients._set_sync_gradients(sync)

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
        with _muted(self._trainer) as state, kept(self.attributes):
            metrics = self._trainer.evaluate()
            for logged in state.log_history:  # TRL adds its own when it logs
                metrics = {**logged, **metrics}
        if self._metric not in metrics:
            names = [n for n in metrics if not n.endswith(NOT_METRICS)]
            raise ValueError(
                f"metric={self._metric!r}: evaluation does not produce it; it gives {', '.join(sorted(names))}."
            )
        return self._sign * float(metrics[self._metric])


@contextmanager
def _muted(trainer: Trainer) -> Iterator[Any]:
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


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        batch = None
        for batch in loader:  # noqa: UP028  # the last batch tells an epoch from an empty one
            yield batch
        if batch is None:
            raise ValueError("train_dataset: an epoch of it has no batches.")


def _calling_trainer() -> Trainer:
    """Return the Trainer that has called a callback, which it does not hand over: from the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            return owner
        frame = frame.f_back
    raise RuntimeError("AutoLRSCallback: was called by no Trainer.")


def _install_scheduler(trainer: Trainer) -> TunedLR:
    trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = TunedLR(trainer.optimizer)
    trainer._created_lr_scheduler = True
    return trainer.lr_scheduler


def _check_trainer(trainer: Trainer, metric: str | None, measures: bool) -> None:
    """Raise ValueError or RuntimeError, naming the setting, for what AutoLRS cannot work with."""
    args, accelerator, kind = trainer.args, trainer.accelerator, type(trainer).__name__
    doors = [c for c in trainer.callback_handler.callbacks if isinstance(c, AutoLRSCallback)]
    if len(doors) > 1:
        raise ValueError(f"callbacks: has {len(doors)} AutoLRSCallbacks; one learning rate has one.")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in ("linear", "constant"):
        raise ValueError(
            f"lr_scheduler_type={schedule!r}: would fight with AutoLRS over the learning rate; leave it out."
        )
    if trainer.lr_scheduler is not None and not isinstance(trainer.lr_scheduler, TunedLR):
        raise ValueError("optimizers: has a scheduler, which would fight with AutoLRS; give (optimizer, None).")
    if trainer.is_deepspeed_enabled:
        raise RuntimeError("deepspeed: keeps its state where AutoLRS cannot roll it back; use it without.")
    if accelerator.num_processes > 1:
        raise RuntimeError(f"{accelerator.num_processes} processes: AutoLRS in a Trainer runs on one for now.")
    halves = any(p.dtype == torch.float16 and p.requires_grad for p in trainer.model.parameters())
    if (halves or accelerator.mixed_precision == "fp16") and accelerator.scaler is None:
        raise ValueError("fp16: trains without a gradient scaler here, and would underflow; use bf16 or fp32.")
    if metric is not None and trainer.eval_dataset is None:
        raise ValueError(f"metric={metric!r}: needs an eval_dataset.")
    if not measures and metric is None:
        raise ValueError(
            f"{kind}: its training loss is no measure of progress; give AutoLRSCallback a metric that evaluation "
            "produces, such as metric='eval_reward', and the trainer an eval_dataset."
        )
