"""AutoLRS in a transformers Trainer, and in the trainers of TRL that build on it."""

import logging
import sys
import weakref
from typing import Any, Unpack

from autolrs_plugin.training.hosted import HostedLoop, HostedResults, HostedRun, check_begin
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.lr import TunedLR
from autolrs_plugin.training.settings import HostedOptions, HostedSettings, sign_of

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState

    from autolrs_plugin.integrations.accelerate import check_accelerator
    from autolrs_plugin.integrations.trainer_host import TrainerHost
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS in a Trainer: needs transformers and accelerate ({error}): "
        "pip install 'vllm-sarathi[autolrs,transformers]'",
        name="transformers",
    ) from error

logger = logging.getLogger("autolrs_plugin")

LEARN_FROM_REWARDS = {
    f"{method}Trainer"
    for method in ["GRPO", "RLOO", "PPO", "OnlineDPO", "XPO", "NashMD", "AsyncGRPO", "GMPO", "A2PO"]
}
"""Trainers of TRL whose loss is no measure of progress."""


class AutoLRSCallback(TrainerCallback, ExportableState, HostedResults):
    """Finds the learning rate while a Trainer trains: `Trainer(..., callbacks=[AutoLRSCallback((1e-6, 1e-2))])`.

    A search takes place before a step, on batches of its own from the Trainer's dataloader, and is rolled back bit
    for bit: `global_step`, the order of the training batches and the logs are what they would be without. Works with
    PEFT, gradient accumulation and checkpointing, mixed precision, evaluation, early stopping and
    `resume_from_checkpoint` (its state is in each checkpoint's trainer_state.json). Give it to the Trainer's
    constructor.

    Args:
        lr_range: the lowest and the highest learning rate to try, of the first parameter group.
        metric: what to decide by, as `trainer.evaluate()` names it; needs an eval_dataset. None for `eval_loss`, or
            for the training loss where there is no eval_dataset.
        greater_is_better: whether the metric grows with progress; None: true unless its name ends in `loss`.
        loss_is_progress: whether the training loss measures progress; without, a metric is needed. None for: except
            in TRL's trainers that learn from rewards.
        options: what every adapter takes, see HostedOptions.

    Raises:
        ConfigError: a setting that cannot be used. What cannot be tuned in the Trainer is refused when the Trainer is
            constructed, or before its first step.
    """

    def __init__(
        self,
        lr_range: tuple[float, float],
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        loss_is_progress: bool | None = None,
        **options: Unpack[HostedOptions],
    ) -> None:
        self._settings = HostedSettings.checked("AutoLRSCallback", lr_range, options)
        self._metric, self._sign = metric, sign_of(metric, greater_is_better)
        self._loss_is_progress = loss_is_progress
        self._observer = self._settings.observer()
        self._host: TrainerHost | None = None
        # As the Trainer makes a callback anew with `restore_callback_states_from_checkpoint`.
        own = {"metric": metric, "greater_is_better": self._sign < 0, "loss_is_progress": loss_is_progress}
        self._arguments = {**own, **self._settings.arguments()}

    def state(self) -> dict[str, Any]:
        """Return the run so far, which the Trainer writes into each checkpoint."""
        return {"args": self._arguments, "attributes": {"journal": self.run.state()} if self.run else {}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the Trainer that is being constructed, and give it a scheduler that tells the rates in use."""
        trainer = _calling_trainer()
        _check_trainer(trainer, self._metric, self._measures(trainer))
        if args.restore_callback_states_from_checkpoint and (
            self._settings.generators or self._settings.stateful
        ):
            raise ValueError(
                "restore_callback_states_from_checkpoint: would make an AutoLRSCallback without its generators= and "
                "stateful=; leave it out: what the tuner has done is restored all the same."
            )
        # A Trainer that refers to itself is left to the garbage collector, which closes the queues of persistent
        # workers before they are told to end: each is then waited for in vain, for five seconds.
        owner = weakref.ref(trainer)
        vars(trainer)["create_scheduler"] = lambda *args, **kwargs: _install_scheduler(owner())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run, or go on with the one in the checkpoint."""
        trainer = _calling_trainer()
        again = self._host is not None  # the Trainer begins again after an error, with a smaller batch
        self._release()
        # At step 0 it is not a checkpoint's, but this callback's own of a run before.
        saved = self._in_checkpoint(state) if state.global_step > 0 else None
        if again and saved is None and state.global_step == 0:
            logger.warning(
                "AutoLRSCallback: the Trainer starts again after an error, and so does the search."
            )
            self.run = None
        check_begin("AutoLRSCallback", state.global_step, saved, self.run)
        if not isinstance(trainer.lr_scheduler, TunedLR):
            _check_trainer(trainer, self._metric, self._measures(trainer))
            _install_scheduler(trainer)
        if state.is_hyper_param_search:
            raise ValueError(
                "hyperparameter_search: trains once for each choice, and AutoLRS finds the learning rate within one "
                "run; call train(), or leave the AutoLRSCallback out."
            )
        metric = self._metric or "eval_loss"
        host = TrainerHost(trainer, self._measures(trainer), metric, self._sign)
        validates = trainer.eval_dataset is not None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        config = self._settings.config(optimizer, state.max_steps, validates)
        stateful = dict(self._settings.stateful)
        if trainer.accelerator.scaler is not None:
            stateful["scaler"] = trainer.accelerator.scaler
        job = Job(
            trainer.model,
            optimizer,
            stateful=stateful,
            generators=self._settings.generators,
            keep=self._settings.keep,
            roots=host.roots(),
        )
        loop = HostedLoop(job, host)
        self.run = HostedRun(config, loop, saved, state.global_step, [self._observer])
        if validates and saved is None:
            loop.check_metric(f"metric={metric!r}")
        self._host = host
        host.record()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Search if a search is due, and set the step's learning rate."""
        self._running()[0].before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's loss."""
        run, host = self._running()
        run.after_step(host.recorded_loss())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the Trainer's objects."""
        self._release()

    def _measures(self, trainer: Trainer) -> bool:
        names = {c.__name__ for c in type(trainer).__mro__}
        return not names & LEARN_FROM_REWARDS if self._loss_is_progress is None else self._loss_is_progress

    def _in_checkpoint(self, state: Any) -> str | None:
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        journal: str | None = found.get("attributes", {}).get("journal")
        return journal

    def _running(self) -> tuple[HostedRun, TrainerHost]:
        if self.run is None or self._host is None:
            raise RuntimeError(
                "AutoLRSCallback: was added to a Trainer that has already started; give it to the constructor: "
                "Trainer(..., callbacks=[AutoLRSCallback(...)])."
            )
        return self.run, self._host

    def _release(self) -> None:
        if self._host is not None and self.run is not None:
            self._host.release()
            self.run.close()
        self._host = None


def _calling_trainer() -> Trainer:
    """Return the Trainer that has called a callback, which it does not hand over: from the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            return owner
        frame = frame.f_back
    raise RuntimeError("AutoLRSCallback: was called by no Trainer.")


def _install_scheduler(trainer: Trainer | None) -> TunedLR:
    assert trainer is not None, "a method of it was called"
    trainer.lr_scheduler = trainer.callback_handler.lr_scheduler = TunedLR(trainer.optimizer)
    trainer._created_lr_scheduler = True
    return trainer.lr_scheduler


def _check_trainer(trainer: Trainer, metric: str | None, measures: bool) -> None:
    """Raise ValueError or RuntimeError, naming the setting, for what AutoLRS cannot work with."""
    args, kind = trainer.args, type(trainer).__name__
    doors = [c for c in trainer.callback_handler.callbacks if isinstance(c, AutoLRSCallback)]
    if len(doors) > 1:
        raise ValueError(
            f"callbacks: has {len(doors)} AutoLRSCallbacks; only one can set the learning rate, so leave out the "
            "others."
        )
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in ("linear", "constant"):
        raise ValueError(
            f"lr_scheduler_type={schedule!r}: conflicts with AutoLRS, which sets the learning rate; leave it out."
        )
    if args.warmup_steps:
        logger.warning(
            "warmup_steps=%g: is not used; AutoLRSCallback warms up over a share of the steps that its own setting "
            "warmup= says.",
            args.warmup_steps,
        )
    if trainer.lr_scheduler is not None and not isinstance(trainer.lr_scheduler, TunedLR):
        if trainer._created_lr_scheduler:
            raise ValueError(
                "AutoLRSCallback: was added to a Trainer that has made its scheduler already; give the callback to the "
                "Trainer's constructor: Trainer(..., callbacks=[AutoLRSCallback(...)])."
            )
        raise ValueError("optimizers: has a scheduler, which conflicts with AutoLRS; give (optimizer, None).")
    check_accelerator(trainer.accelerator, trainer.model)
    if metric is not None and trainer.eval_dataset is None:
        raise ValueError(f"metric={metric!r}: needs an eval_dataset.")
    if not measures and metric is None:
        raise ValueError(
            f"{kind}: its training loss is no measure of progress; give AutoLRSCallback a metric that evaluation "
            "produces, such as metric='eval_reward', and the trainer an eval_dataset."
        )
