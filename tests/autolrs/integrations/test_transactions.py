"""A probe inside of a framework is a transaction; and what frameworks allow beside a module and one loader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainingArguments

from autolrs_plugin.core.actions import Action, Probe, Restore, Snapshot, Train
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.scripted import script

PLAN: tuple[Action, ...] = (
    Snapshot(),
    Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=False),
    Probe(0, 1, (0.01,) * 5, float("inf"), evaluate=False, draw=1),
    Restore(),
    Train(0, (0.05,) * 12),
)
STEPS, PROBED = 12, 9
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Module(LightningModule):
    """A module whose training_step calls `hook` first."""

    def __init__(self, hook: Callable[[Any], None] = lambda module: None, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.hook, self.skip = nn.Linear(8, 2), hook, skip

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hook(self)
        if self.skip and batch[0].sum() > 0:
            return None
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return sum(cross_entropy(self.layer(x), y) for x, y in parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def fit(
    folder: Path,
    module: LightningModule,
    data: Any,
    tuned: bool = True,
    checkpoint: Any = None,
    *more: Callback,
) -> LightningTrainer:
    tuner = [LightningCallback((1e-3, 1.0), progress=False)] if tuned else []
    trainer = LightningTrainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*tuner, *more],
    )  # fmt: skip
    with script(PLAN):
        trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


class Boom(Exception):
    """An error of the user's own."""


class CallsAt:
    """Calls `what` at its call of number `number`."""

    def __init__(self, number: int, what: Callable[[Any], None]) -> None:
        self.left, self.what = number, what

    def __call__(self, module: Any) -> None:
        CALLS[0] += 1
        if CALLS[0] == self.left:
            self.what(module)


CALLS = [0]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS[0] = 0


def raise_boom(module: Any) -> None:
    raise Boom("boom")


@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_a_lightning_probe_that_raises_leaves_a_checkpoint_of_the_real_step(
    number: int, tmp_path: Path
) -> None:
    module = Module(CallsAt(number, raise_boom))
    weight = module.layer.weight.detach().clone()
    with pytest.raises(Boom):
        fit(tmp_path, module, loader(), True, None, OnExceptionCheckpoint(tmp_path))
    assert torch.equal(module.layer.weight, weight)
    whole = Module()
    fit(tmp_path / "whole", whole, loader())
    resumed = Module()
    trainer = fit(tmp_path / "resumed", resumed, loader(), True, tmp_path / "on_exception.ckpt")
    assert trainer.global_step == STEPS
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.parametrize("number", [2, 4, 8])
def test_a_checkpoint_that_is_asked_for_in_a_lightning_probe_is_of_the_real_step(
    number: int, tmp_path: Path
) -> None:
    def save(module: Any) -> None:
        module.trainer.save_checkpoint(tmp_path / "asked.ckpt")

    module = Module(CallsAt(number, save))
    weight = module.layer.weight.detach().clone()
    fit(tmp_path, module, loader())
    saved = torch.load(tmp_path / "asked.ckpt", weights_only=True)
    assert saved["global_step"] == 0
    assert torch.equal(saved["state_dict"]["layer.weight"], weight)
    assert saved["optimizer_states"][0]["state"] == {}
    assert any("AutoLRS" in name for name in saved["callbacks"])
    whole, resumed = Module(), Module()
    fit(tmp_path / "whole", whole, loader())
    assert torch.equal(module.layer.weight, whole.layer.weight)  # the probe went on, and so did the run
    fit(tmp_path / "resumed", resumed, loader(), True, tmp_path / "asked.ckpt")
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_a_validation_step_without_a_loader(tmp_path: Path) -> None:
    class Validating(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    assert fit(tmp_path, Validating(), loader()).global_step == STEPS


@pytest.mark.parametrize("kind", ["dict", "skipping"])
def test_several_loaders_and_skipped_batches_are_those_of_the_run_without(kind: str, tmp_path: Path) -> None:
    def seeing(into: list[float]) -> Callable[[Any], None]:
        return lambda module: into.append(float(module.layer.weight.sum()))

    weights = []
    for tuned in (False, True):
        module = Module(skip=kind == "skipping")
        data = {"a": loader(), "b": loader()} if kind == "dict" else loader()
        if not tuned:
            module.configure_optimizers = lambda m=module: torch.optim.AdamW(m.parameters(), lr=0.05)
        assert fit(tmp_path / str(tuned), module, data, tuned).global_step == STEPS
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_module_that_skips_all_batches_is_told(tmp_path: Path) -> None:
    class Never(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ValueError, match=r"training_step: returned None for 100 batches in a row"):
        fit(tmp_path, Never(), loader())


def test_a_metric_of_the_module_counts_the_runs_batches_alone(tmp_path: Path) -> None:
    metrics = pytest.importorskip("torchmetrics")
    rows = []

    class Counting(Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = metrics.SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.rows(float(len(batch[1])))
            self.log("rows", self.rows, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            rows.append(float(trainer.callback_metrics["rows"]))

    fit(tmp_path, Counting(), loader(), True, None, Watch())
    assert rows[0] == 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = nn.Linear(8, 2), []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            SEEN.append(float(x.sum()))
        logits = self.layer(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


SEEN: list[float] = []


class Numbered(Dataset):
    """A data set that is told of epochs."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i] + self.epoch % 100, "labels": int(Y[i])}


class Lazy:
    """A collator that makes its generator at its first call, as that of masked language models does."""

    generator: torch.Generator | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(42)
        x = torch.stack([item["x"] for item in items])
        noise = torch.rand(x.shape, generator=self.generator)
        return {"x": x + noise, "labels": torch.tensor([item["labels"] for item in items])}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": STEPS,
    }
    return TrainingArguments(str(folder), **{**quiet, "per_device_train_batch_size": 8, **options})


def tuned() -> AutoLRSCallback:
    return AutoLRSCallback((1e-3, 1.0), progress=False)


def test_epochs_and_generators_of_a_trainers_data_are_those_of_the_run_without(tmp_path: Path) -> None:
    seen = []
    for callbacks in ([], [tuned()]):
        SEEN.clear()
        torch.manual_seed(0)
        trainer = Trainer(
            Net(), arguments(tmp_path), train_dataset=Numbered(), data_collator=Lazy(), callbacks=callbacks
        )
        with script(PLAN):
            trainer.train()
        seen.append(SEEN[-STEPS:])
    assert len(SEEN) == STEPS + PROBED
    assert seen[0] == seen[1]


def test_persistent_workers_end_with_their_probe(tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = Trainer(Net(), arguments(tmp_path, **workers), train_dataset=Numbered(), callbacks=[tuned()])
    with script(PLAN):
        trainer.train()
    own = [
        p
        for p in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(p.cmdline())
    ]
    assert len(own) <= 1
    assert trainer.args.dataloader_persistent_workers


class Failing(Trainer):
    """Runs out of memory at its step of number `at`, once."""

    at, calls = 0, 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        type(self).calls += 1
        if self.calls == self.at:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("at", [2, 6, PROBED + 4], ids=["first probe", "second probe", "real step"])
def test_a_trainer_that_runs_out_of_memory_begins_again(at: int, tmp_path: Path) -> None:
    Failing.at, Failing.calls = at, 0
    options = {"auto_find_batch_size": True}
    model = Net()
    weight, begun = model.layer.weight.detach().clone(), []

    class Watch(AutoLRSCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(torch.equal(model.layer.weight, weight))
            super().on_train_begin(args, state, control, **kwargs)

    tuner = Watch((1e-3, 1.0), progress=False)
    trainer = Failing(model, arguments(tmp_path, **options), train_dataset=Numbered(), callbacks=[tuner])
    with script(PLAN):
        trainer.train()
    assert trainer.state.global_step == len(tuner.schedule) == STEPS
    assert begun == [True, at <= PROBED]


def test_schedule_free_in_a_trainer_keeps_its_average_and_mode(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    plan = (*PLAN[:1], Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=True), *PLAN[3:])
    weights = []
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 0.05}
    for callbacks, data in (([], None), ([tuned()], Numbered())):
        torch.manual_seed(0)
        model = Net()
        trainer = Trainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=Numbered(),
            eval_dataset=data,
            callbacks=callbacks,
        )
        with script(plan):
            trainer.train()
        weights.append(model.layer.weight.detach().clone())
        average = [g["weight_sum"] for g in trainer.optimizer.optimizer.param_groups]
        weights.append(torch.tensor(average))
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
