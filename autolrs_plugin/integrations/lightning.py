"""AutoLRS in a Lightning Trainer, as a callback."""

import math
from typing import Any, Unpack

import torch

from autolrs_plugin.training.hosted import HostedLoop, HostedResults, HostedRun, check_begin
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.settings import HostedOptions, HostedSettings, sign_of

try:
    from autolrs_plugin.integrations.lightning_host import LightningHost, loss_of
    from autolrs_plugin.integrations.lightning_package import PACKAGE, Callback, LightningModule, Trainer
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS in Lightning: needs lightning ({error}): pip install 'vllm-sarathi[autolrs,lightning]'",
        name="lightning",
    ) from error


class AutoLRSCallback(Callback, HostedResults):
    """Finds the learning rate while a Trainer trains: `Trainer(..., callbacks=[AutoLRSCallback((1e-6, 1e-2))])`.

    A search takes place before a step, on batches of its own from the train dataloader, and is rolled back bit for bit:
    `global_step`, the order of the training batches, metrics and logs are what they would be without. Its state is in
    Lightning's checkpoints. `configure_optimizers` returns one optimizer and no scheduler.

    Automatic optimisation: accumulation, clipping, precision and the module's hooks around backward and step are as in
    training. Manual optimisation: one `training_step` takes one optimizer step, and returns the loss.

    Args:
        lr_range: the lowest and the highest learning rate to try, of the first parameter group.
        metric: what to decide by, as the module logs it in validation. None for `val_loss`, or for the training loss
            where there is no validation.
        greater_is_better: whether the metric grows with progress; None: true unless its name ends in `loss`.
        options: what every adapter takes, see HostedOptions.

    Raises:
        ConfigError: a setting that cannot be used. What cannot be tuned in the Trainer is refused before its first
            step, with a message that names it.
    """

    def __init__(
        self,
        lr_range: tuple[float, float],
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        **options: Unpack[HostedOptions],
    ) -> None:
        self._settings = HostedSettings.checked("AutoLRSCallback", lr_range, options)
        self._metric, self._sign = metric, sign_of(metric, greater_is_better)
        self._observer = self._settings.observer()
        self._saved: str | None = None
        self._losses: list[torch.Tensor] = []
        self._last: Any = 0.0
        self._begun = False
        self._step = 0

    # Not state_dict() and load_state_dict(): of two callbacks that have them, Lightning's own error comes before ours.

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run so far to a checkpoint of Lightning's."""
        if self.run is not None:
            checkpoint["callbacks"][self.state_key] = {"journal": self.run.state()}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the run in a checkpoint."""
        self._saved = checkpoint["callbacks"].get(self.state_key, {}).get("journal")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the Trainer before any training, and come before callbacks that log the learning rate."""
        _check_trainer(trainer, pl_module)
        for group in trainer.optimizers[0].param_groups:
            group.setdefault("initial_lr", group["lr"])  # a checkpoint brings back the rate of its step
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]  # Lightning gives it none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the run, or go on with the one in the checkpoint."""
        check_begin("AutoLRSCallback", trainer.global_step, self._saved, self.run)
        steps = trainer.estimated_stepping_batches
        if not (math.isfinite(steps) and steps > 0):
            raise ValueError(
                "max_steps: is not given and the train dataloader has no length; give the Trainer max_steps."
            )
        metric = self._metric or "val_loss"
        host = LightningHost(trainer, pl_module, metric, self._sign)
        if self._metric is not None and not host.validates:
            raise ValueError(
                f"metric={self._metric!r}: needs validation: a validation_step and a dataloader for it."
            )
        config = self._settings.config(trainer.optimizers[0], int(steps), host.validates)
        job = Job(
            pl_module,
            trainer.optimizers[0],
            stateful={**host.stateful(), **self._settings.stateful},
            generators=[*host.generators, *self._settings.generators],
            keep=self._settings.keep,
            roots=host.roots(),
        )
        loop = HostedLoop(job, host)
        self.run = HostedRun(config, loop, self._saved, trainer.global_step, [self._observer])
        if host.validates and self._saved is None:
            loop.check_metric(f"metric={metric!r}")
        self._saved, self._losses, self._step, self._begun = None, [], trainer.global_step, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Search if a search is due, and set the step's learning rate."""
        if self.run is None:
            raise RuntimeError("AutoLRSCallback: was added to a Trainer that has already started.")
        if not self._begun:
            self.run.before_step()
            self._begun = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss."""
        assert self.run is not None
        if (loss := loss_of(outputs)) is not None:
            self._losses.append(loss)
        taken, self._step = trainer.global_step - self._step, trainer.global_step
        if taken > 1 or (taken == 0 and not pl_module.automatic_optimization):
            raise ValueError(
                f"training_step: took {taken} optimizer steps; with manual optimisation it must take one, and no more."
            )
        if taken:
            losses, self._losses, self._begun = self._losses, [], False
            # A step whose batches were all skipped has no loss of its own: that of the step before stands for it.
            self._last = sum(losses) if losses else self._last
            self.run.after_step(self._last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the Trainer's objects."""
        if self.run is not None:
            self.run.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module, whose methods Lightning gives to every callback."""
        for name in ("log", "log_dict"):
            vars(self).pop(name, None)


def _check_trainer(trainer: Any, module: LightningModule) -> None:
    """Raise ValueError or RuntimeError, naming it, for what AutoLRS cannot work with."""
    if not issubclass(type(trainer), Trainer):
        theirs = type(trainer).__module__.partition(".trainer")[0]
        raise TypeError(
            f"trainer: is one of {theirs}, and AutoLRSCallback was made for {PACKAGE}; import the Trainer from there, "
            f"or import {theirs} before autolrs_plugin and {PACKAGE} nowhere."
        )
    count = sum(isinstance(callback, AutoLRSCallback) for callback in trainer.callbacks)
    if count > 1:
        raise ValueError(
            f"callbacks: has {count} AutoLRSCallbacks; a run has one learning rate, so give one."
        )
    if trainer.lr_scheduler_configs:
        scheduler = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise ValueError(
            f"configure_optimizers: returns a {scheduler}, which conflicts with AutoLRS, which sets the learning "
            "rate; leave it out."
        )
    if not any(
        optimizer.param_groups for optimizer in trainer.optimizers
    ):  # Lightning puts an empty one there
        raise ValueError("configure_optimizers: returns no optimizer; AutoLRS needs one.")
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"configure_optimizers: returns {len(trainer.optimizers)} optimizers; AutoLRS needs one."
        )
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy or "FSDP" in strategy:
        raise RuntimeError(
            f"strategy: {strategy} keeps its state where AutoLRS cannot roll it back; train with 'ddp', or with "
            "ModelParallelStrategy and fully_shard (FSDP2) in configure_model."
        )
    halves = any(p.dtype == torch.float16 and p.requires_grad for p in module.parameters())
    if halves or (trainer.precision == "16-mixed" and trainer.precision_plugin.scaler is None):
        raise ValueError(
            f"precision={trainer.precision!r}: trains without a gradient scaler, and would underflow."
        )
