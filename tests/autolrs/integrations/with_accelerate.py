"""The task in a hand-written loop on an Accelerator."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.tracking import GeneralTracker

from autolrs_plugin.integrations.accelerate import AutoLRS
from autolrs_plugin.training.lr import GroupRates
from tests.autolrs.integrations import task


class Tracker(GeneralTracker):
    """Where accelerator.log() ends."""

    name = "list"
    requires_logging_directory = False

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        super().__init__()

    @property
    def tracker(self) -> list[dict[str, Any]]:
        return self.entries

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.entries.append({"step": step, **values})


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
    **options: Any,
) -> task.Outcome:
    """Train; with `tuned` as AutoLRS's settings, or with the rates of `replay`."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable and own is None),
        log_with=[tracker := Tracker()],
        **options,
    )
    accelerator.init_trackers("task")
    model = net = task.Net(dropout)
    if shard:  # by the user's own hand: Accelerate's plugin needs an accelerator
        task.shard(model)
    optimizer = task.make_optimizer(model)
    rates = GroupRates(optimizer)
    loader = task.loader(task.Pictures(noise=noise), task.BATCH // accumulate, own)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    if not shard:
        model = accelerator.prepare(model)
    judge, outcome = task.validation(), task.Outcome({}, [], 0)

    def train_step(batch: Any) -> torch.Tensor:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=int(net.count))
        return loss

    def validate() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(**judge)["loss"]

    tuner = None
    if tuned is not None:
        settings = {"max_steps": steps, "lr_range": task.RANGE, "progress": False, **tuned}
        tuner = AutoLRS(accelerator, model, optimizer, loader, train_step, validate=validate, **settings)
    step, taken, epoch_steps = 0, 0, len(loader) // accumulate
    task.seed_everything()
    if resume is not None:
        accelerator.load_state(str(folder / str(resume)))
        step = resume
    while step < steps and step != stop_at:
        loader.set_epoch(step // epoch_steps)
        skipped = step % epoch_steps
        batches = skip_first_batches(loader, skipped * accumulate) if skipped else loader
        for number, batch in enumerate(batches):
            if number == 0 and step == resume and skipped:
                accelerator.load_state(
                    str(folder / str(resume))
                )  # the generators, as they were before this batch
            if tuner is not None:
                tuner.step(batch)
            elif replay is not None:
                rates.set(replay[step])
                train_step(batch)
            outcome.rates.append(task.rates_of(optimizer))
            taken += 1
            if taken % accumulate:
                continue
            if count:
                outcome.snapshots.append(task.snapshots_alive())
            step += 1
            if step in (steps, stop_at):
                break
    accelerator.gradient_state._remove_dataloader(loader)
    if stop_at is not None:
        accelerator.save_state(str(folder / str(stop_at)))
    outcome.bits, outcome.trained_on, outcome.steps = (
        task.all_bits(net, optimizer),
        net.trained_on(),
        step,
    )
    outcome.rates, outcome.logs = outcome.rates[::accumulate], tracker.entries
    outcome.random = task.random_state()
    if tuner is not None:
        outcome.take_over(tuner)
    return outcome
