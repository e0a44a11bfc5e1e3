"""AutoLRS in a transformers Trainer, and in the trainers of TRL that build on it."""

import logging
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from autolrs_plugin.training.checking import plain_numbers
from autolrs_plugin.training.hosted import HostedLoop, HostedResults, HostedRun, check_begin, hosted_config
from autolrs_plugin.training.inventory import Stateful
from autolrs_plugin.training.lr import TunedLR, checked_prior, earlier_plateau, prior_lr
from autolrs_plugin.training.progress import StageLines, StageLog
from autolrs_plugin.training.rng import Generator

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState

    from autolrs_plugin.integrations.accelerate import check_accelerator
    from autolrs_plugin.integrations.trainer_host import TrainerHost
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS in a Trainer: needs transformers and accelerate ({error}): "
        "pip install 'vllm-sarathi[transformers]'",
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

    A search takes place before a step, on batches that the Trainer's own dataloader gives anew, and is rolled back bit
    for bit: `global_step`, the order of the training batches and the logs are what they would be without. Works with
    PEFT, gradient accumulation and checkpointing, mixed precision, evaluation, early stopping and
    `resume_from_checkpoint` (its state is in each checkpoint's trainer_state.json). Give it to the Trainer's
    constructor.

    Args:
        lr_range: the least and the greatest learning rate to try, of the first parameter group.
        search_budget: the steps that the search may take, as a fraction of the run's, in (0, 1].
        seed: of everything that the search draws.
        prior: the learning rate to begin with and to keep without evidence: `optimizer` for the one that the
            optimizer was built with, a number in `lr_range`, or None to know none.
        warm_start: the folder of an earlier run (what `save` wrote, or a `run_dir`), whose learning rates are
            followed and hardly searched for.
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
        search_budget: float = 0.2,
        seed: int = 0,
        prior: float | str | None = "optimizer",
        warm_start: str | os.PathLike[str] | None = None,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        loss_is_progress: bool | None = None,
        generators: Sequence[Generator] = (),
        stateful: Mapping[str, Stateful] | None = None,
        keep: str = "host",
        progress: bool = True,
        **settings: Any,
    ) -> None:
        self._settings = plain_numbers(
            {"lr_range": lr_range, "search_budget": search_budget, "seed": seed, **settings}
        )
        self._earlier = {"warm_start": earlier_plateau(warm_start)}
        hosted_config("AutoLRSCallback", 1, False, {**self._settings, **self._earlier})
        self._prior = checked_prior(prior, lr_range)
        greater = not (metric or "loss").endswith("loss") if greater_is_better is None else greater_is_better
        self._metric, self._sign = metric, -1.0 if greater else 1.0
        self._loss_is_progress = loss_is_progress
        self._generators, self._stateful, self._keep = tuple(generators), dict(stateful or {}), keep
        self._observer = StageLines() if progress else StageLog()
        self._host: TrainerHost | None = None
        # As the Trainer makes a callback anew with `restore_callback_states_from_checkpoint`.
        self._arguments = {
            "metric": metric,
            "greater_is_better": greater,
            "loss_is_progress": loss_is_progress,
            "prior": self._prior,
            "warm_start": None if warm_start is None else os.fspath(warm_start),
        }
        self._arguments |= {"keep": keep, "progress": progress, **self._settings}

    def state(self) -> dict[str, Any]:
        """Return the run so far, which the Trainer writes into each checkpoint."""
        return {"args": self._arguments, "attributes": {"journal": self.run.state()} if self.run else {}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the Trainer that is being constructed, and give it a scheduler that tells the rates in use."""
        trainer = _calling_trainer()
        _check_trainer(trainer, self._metric, self._measures(trainer))
        if args.restore_callback_states_from_checkpoint and (self._generators or self._stateful):
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
            logger.warning("AutoLRSCallback: the Trainer begins anew after an error, and so does the search.")
            self.run = None
        check_begin("AutoLRSCallback", state.global_step, saved, self.run)
        if not isinstance(trainer.lr_scheduler, TunedLR):
            _check_trainer(trainer, self._metric, self._measures(trainer))
            _install_scheduler(trainer)
        if state.is_hyper_param_search:
            raise ValueError(
                "hyperparameter_search: AutoLRS finds the learning rate within one run; use one."
            )
        host = TrainerHost(trainer, self._measures(trainer), self._metric or "eval_loss", self._sign)
        validates = trainer.eval_dataset is not None
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        known = {"prior_lr": prior_lr(self._prior, optimizer), **self._earlier}
        config = hosted_config("AutoLRSCallback", state.max_steps, validates, {**known, **self._settings})
        stateful = dict(self._stateful)
        if trainer.accelerator.scaler is not None:
            stateful["scaler"] = trainer.accelerator.scaler
        loop = HostedLoop(
            trainer.model, optimizer, host, stateful, self._generators, self._keep, host.roots()
        )
        self.run = HostedRun(config, loop, saved, state.global_step, [self._observer])
        if self._metric is not None and saved is None:
            loop.evaluate()  # an unknown metric shows before any training
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
        raise ValueError(f"callbacks: has {len(doors)} AutoLRSCallbacks; one learning rate has one.")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule not in ("linear", "constant"):
        raise ValueError(
            f"lr_scheduler_type={schedule!r}: would fight with AutoLRS over the learning rate; leave it out."
        )
    if args.warmup_steps:
        logger.warning(
            "warmup_steps=%g: is not used; AutoLRSCallback warms up over a share of the steps that its own setting "
            "warmup= says.",
            args.warmup_steps,
        )
    if trainer.lr_scheduler is not None and not isinstance(trainer.lr_scheduler, TunedLR):
        raise ValueError(
            "optimizers: has a scheduler, which would fight with AutoLRS; give (optimizer, None)."
        )
    check_accelerator(trainer.accelerator, trainer.model)
    if metric is not None and trainer.eval_dataset is None:
        raise ValueError(f"metric={metric!r}: needs an eval_dataset.")
    if not measures and metric is None:
        raise ValueError(
            f"{kind}: its training loss is no measure of progress; give AutoLRSCallback a metric that evaluation "
            "produces, such as metric='eval_reward', and the trainer an eval_dataset."
        )
