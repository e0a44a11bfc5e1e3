"""The task in a transformers Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from autolrs_plugin.integrations.transformers import AutoLRSCallback
from autolrs_plugin.training.lr import ReplayLR
from tests.autolrs.integrations import task


class Watch(TrainerCallback):
    """A callback of the user's."""

    def __init__(self, optimizer: torch.optim.Optimizer, stop_at: int | None, count: bool) -> None:
        self.optimizer, self.stop_at, self.count = optimizer, stop_at, count
        self.rates: list[list[float]] = []
        self.snapshots: list[int] = []
        self.logs: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            task.seed_everything()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(task.rates_of(self.optimizer))
        if self.count:
            self.snapshots.append(task.snapshots_alive())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **task.without_times(kwargs["logs"])})


def run(
    folder: Path,
    tuned: dict[str, Any] | None,
    replay: tuple[float, ...] | None = None,
    steps: int = task.STEPS,
    accumulate: int = 1,
    noise: float = 0.0,
    dropout: float = 0.2,
    resume: int | None = None,
    stop_at: int | None = None,
    seedable: bool = True,
    count: bool = False,
    own: str | None = None,
    shard: bool = False,
    **arguments: Any,
) -> task.Outcome:
    """Train; with `tuned` as AutoLRSCallback's settings, or with the rates of `replay`."""
    assert own is None, "a Trainer makes its own loader"
    model = task.Net(dropout)
    # What is spread by hand the Trainer cannot write: it does so for Accelerate's own sharding alone.
    saves = steps == task.STEPS and not shard
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=task.BATCH // accumulate,
        per_device_eval_batch_size=task.VALIDATION,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.5,
        accelerator_config={"use_seedable_sampler": seedable},
        logging_steps=1,
        save_strategy="steps" if saves else "no",
        save_steps=1,
        # An evaluation draws from the generators; the plain loop that a long run is compared with has none.
        eval_strategy="steps" if steps == task.STEPS else "no",
        eval_steps=4,
        **arguments,
    )
    if shard:
        task.shard(model)
        # Otherwise Accelerate would wrap it into DDP; its own sharding needs a GPU.
        model._is_accelerate_prepared = True
    optimizer = task.make_optimizer(model)
    watch = Watch(optimizer, stop_at, count)
    tuner = AutoLRSCallback(task.RANGE, progress=False, **tuned) if tuned is not None else None
    trainer = Trainer(
        model,
        args,
        train_dataset=task.Pictures(noise=noise),
        eval_dataset=task.Pictures(task.VALIDATION),
        optimizers=(optimizer, None if replay is None else ReplayLR(optimizer, replay)),
        callbacks=[watch, *([tuner] if tuner else [])],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    if tuner is not None:
        tuner = next(c for c in trainer.callback_handler.callbacks if isinstance(c, AutoLRSCallback))
    outcome = task.Outcome(task.all_bits(model, optimizer), model.trained_on(), trainer.state.global_step)
    outcome.rates, outcome.snapshots, outcome.logs = watch.rates, watch.snapshots, watch.logs
    outcome.random = task.random_state()
    if tuner is not None:
        outcome.take_over(tuner)
    return outcome
