"""The task in a Lightning Trainer, with automatic and with manual optimisation."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from torch.distributed.fsdp import fully_shard

from autolrs_plugin.integrations.lightning import AutoLRSCallback
from autolrs_plugin.training.lr import GroupRates
from tests.autolrs.integrations import task


class ListLogger(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []

    name, version = "list", "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append({"at": step, **metrics})


class Resumable:
    """A shuffled loader that Lightning can save within an epoch."""

    def __init__(self, data: task.Pictures, batch: int) -> None:
        self.data, self.batch, self.epoch, self.position = data, batch, 0, 0

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Any:
        if self.position >= len(self):
            self.position, self.epoch = 0, self.epoch + 1
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self):
            start = self.position * self.batch
            self.position += 1
            items = [self.data[i] for i in order[start : start + self.batch]]
            yield torch.utils.data.default_collate(items)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Judge:
    """The validation batch, from a loader that draws nothing: a stopped run repeats no validation."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        yield task.validation()


class Module(LightningModule):
    def __init__(self, dropout: float, manual: bool, train: Any) -> None:
        super().__init__()
        self.net, self.train_data = task.Net(dropout), train
        self.automatic_optimization = not manual
        self.losses: list[torch.Tensor] = []  # a list of the user's

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(**batch)["loss"]
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        cast(Logger, self.logger).log_metrics({"number": len(self.losses)}, step=self.global_step)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch)["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return task.make_optimizer(self.net)

    def train_dataloader(self) -> Any:
        return self.train_data

    def val_dataloader(self) -> Any:
        return Judge()


class Sharded(Module):
    """Spread over the processes (FSDP2), as ModelParallelStrategy asks for."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        fully_shard(self.net, mesh=mesh["data_parallel"])


class Watch(Callback):
    """A callback of the user's: keeps the generators in the checkpoints, which Lightning does not."""

    def __init__(
        self, folder: Path, replay: tuple[float, ...] | None, stop_at: int | None, count: bool
    ) -> None:
        self.folder, self.replay, self.stop_at, self.count = folder, replay, stop_at, count
        self.rates: list[list[float]] = []
        self.snapshots: list[int] = []
        self.generator: torch.Tensor | None = None
        self.step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"generator": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator = state_dict["generator"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task.seed_everything()
        self.groups = GroupRates(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.generator)
            self.generator = None
        if self.replay is not None:
            self.groups.set(self.replay[trainer.global_step])
        if self.step != trainer.global_step:
            self.step = trainer.global_step
            self.rates.append(task.rates_of(trainer.optimizers[0]))
            if self.count:
                self.snapshots.append(task.snapshots_alive())

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.stop_at:
            trainer.save_checkpoint(self.folder / f"{self.stop_at}.ckpt")
            trainer.should_stop = True


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
    manual: bool = False,
    kind: type[Module] = Module,
    **options: Any,
) -> task.Outcome:
    """Train; with `tuned` as AutoLRSCallback's settings, or with the rates of `replay`."""
    data, batch = task.Pictures(noise=noise), task.BATCH // accumulate
    train = Resumable(data, batch) if seedable and own is None else task.loader(data, batch, own)
    module = kind(dropout, manual, train)
    tuner = AutoLRSCallback(task.RANGE, progress=False, **tuned) if tuned is not None else None
    watch, logger = Watch(folder, replay, stop_at, count), ListLogger()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if manual else 0.5,
        logger=logger,
        log_every_n_steps=1,
        val_check_interval=3 * accumulate if steps == task.STEPS else None,
        limit_val_batches=1.0 if steps == task.STEPS or tuned is not None else 0,
        check_val_every_n_epoch=1 if steps == task.STEPS else 1000,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[watch, LearningRateMonitor("step"), *([tuner] if tuner else [])],
        **options,
    )
    trainer.fit(module, ckpt_path=None if resume is None else folder / f"{resume}.ckpt")
    optimizer = trainer.optimizers[0]
    outcome = task.Outcome(task.all_bits(module.net, optimizer), module.net.trained_on(), trainer.global_step)
    outcome.rates, outcome.snapshots, outcome.random = watch.rates, watch.snapshots, task.random_state()
    outcome.logs = [
        {"learning_rate" if name == "lr-AdamW/pg1" else name: value for name, value in entry.items()}
        for entry in logger.entries
    ]
    outcome.logs.append({"validated": trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed})
    if tuner is not None:
        outcome.take_over(tuner)
    return outcome


run_manual = partial(run, manual=True)
