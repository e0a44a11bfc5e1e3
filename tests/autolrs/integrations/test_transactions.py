"""A probe inside of a framework is a transaction; and what frameworks allow beside a module and one loader."""

import copy
import functools
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset as HFDataset
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainingArguments

from autolrs_plugin.core.actions import Action, Probe, Restore, Snapshot, Train
from autolrs_plugin.integrations.accelerate import AutoLRS
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.jobs import bits, outside
from tests.autolrs.scripted import script

PLAN: tuple[Action, ...] = (
    Snapshot(),
    Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=False),
    Probe(0, 1, (0.01,) * 5, float("inf"), evaluate=False, draw=1),
    Restore(),
    Train(0, (0.05,) * 12),
)
STEPS, PROBED = 12, 9
EVALUATING = tuple(replace(action, evaluate=True) if isinstance(action, Probe) else action for action in PLAN)
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
    assert not tuned or tuner[0].ledger.search.steps == PROBED  # the probes took place
    return trainer


class Boom(Exception):
    """An error of the user's own."""


class CallsAt:
    """Calls `what` at its call of number `number`."""

    def __init__(self, number: int, what: Callable[[Any], None]) -> None:
        self.left, self.what = number, what

    def __call__(self, module: Any) -> None:
        CALLS.held.append(1)
        if len(CALLS.held) == self.left:
            self.what(module)


CALLS = outside([])
"""One for each step, those of probes included."""


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.held.clear()


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


def adamw(module: Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", ["dict", "skipping"])
def test_several_loaders_and_skipped_batches_are_those_of_the_run_without(kind: str, tmp_path: Path) -> None:
    def seeing(into: list[float]) -> Callable[[Any], None]:
        return lambda module: into.append(float(module.layer.weight.sum()))

    weights = []
    for tuned in (False, True):
        module = Module(skip=kind == "skipping")
        data = {"a": loader(), "b": loader()} if kind == "dict" else loader()
        if not tuned:
            kept = functools.partial(adamw, module)
            module.configure_optimizers = kept  # type: ignore[method-assign]
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
        self.layer, self.seen = nn.Linear(8, 2), list[Any]()

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


def tuned() -> Any:
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
    tuner = tuned()
    trainer = Trainer(Net(), arguments(tmp_path, **workers), train_dataset=Numbered(), callbacks=[tuner])
    with script(PLAN):
        trainer.train()
    assert tuner.ledger.search.steps == PROBED
    own = [
        p
        for p in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(p.cmdline())
    ]
    assert len(own) <= 1
    assert trainer.args.dataloader_persistent_workers
    # It refers to itself nowhere: its workers end with it, and not with a later collection, which takes seconds each.
    freed = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert freed() is None
        assert not [p for p in own if p.is_running()]
    finally:
        gc.enable()


class Keeping(Trainer):
    """Gives the same loader each time, as one does whose making is expensive."""

    kept: Any = None

    def get_train_dataloader(self) -> DataLoader:
        if self.kept is None:
            self.kept = super().get_train_dataloader()
        return self.kept


@pytest.mark.parametrize("workers", [0, 1], ids=["in the process", "persistent worker"])
def test_a_loader_that_a_trainer_keeps_loses_no_batch(workers: int, tmp_path: Path) -> None:
    seen = []
    options: dict[str, Any] = {
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "per_device_train_batch_size": 2,  # an epoch is longer than what a worker reads ahead
    }
    plan = (Train(0, (0.05,) * 2), *PLAN[:4], Train(2, (0.05,) * 10))  # within an epoch
    for callbacks in ([], [tuned()]):
        SEEN.clear()
        torch.manual_seed(0)
        trainer = Keeping(
            Net(), arguments(tmp_path, **options), train_dataset=Numbered(), callbacks=callbacks
        )
        with script(plan):
            trainer.train()
        seen.append(SEEN[:2] + SEEN[-10:])
    assert len(SEEN) == STEPS + PROBED
    assert seen[0] == seen[1]


def test_a_checkpoint_that_is_asked_for_in_a_trainers_probe_is_of_the_real_step(tmp_path: Path) -> None:
    """Of a signal handler, say: at each call of the model, in probes and between them."""
    paths = outside([])

    class Asked(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            model: Any = self.model
            if not model.is_saved:
                self._save_checkpoint(model, None)
                paths.held.append(Path(self._get_output_dir(None)) / f"checkpoint-{self.state.global_step}")
                paths.held[-1].rename(tmp_path / f"saved-{len(paths.held)}")
            return loss

    def run(folder: Path, saves: bool, checkpoint: Path | None = None) -> Net:
        torch.manual_seed(0)
        model = Net()
        model.is_saved = not saves
        options = {"save_strategy": "steps", "save_steps": 1000}
        trainer = Asked(model, arguments(folder, **options), train_dataset=Numbered(), callbacks=[tuned()])
        with script(PLAN):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model

    weight = Net().layer.weight
    whole = run(tmp_path / "whole", False)
    asked = run(tmp_path / "asked", True)
    assert torch.equal(asked.layer.weight, whole.layer.weight)  # the probes went on, and so did the run
    assert len(paths.held) == PROBED + STEPS
    for number in (1, 4, 9):
        saved = tmp_path / f"saved-{number}"
        assert torch.equal(load_file(saved / "model.safetensors")["layer.weight"], weight)
        state = json.loads((saved / "trainer_state.json").read_text())
        assert (state["global_step"], "AutoLRSCallback" in state["stateful_callbacks"]) == (0, True)


def test_a_state_that_is_saved_in_a_probe_on_an_accelerator_is_of_the_real_step(tmp_path: Path) -> None:
    def run(saves: bool, load: bool = False) -> Net:
        accelerator, model = Accelerator(cpu=True), Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        data = DataLoader(TensorDataset(X, Y), batch_size=8)
        model, optimizer, batches = accelerator.prepare(model, optimizer, data)
        calls = outside([])

        def step(batch: Any) -> torch.Tensor:
            loss = model(*batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            calls.held.append(1)
            if len(calls.held) in (1, 4, 9) and saves:
                accelerator.save_state(str(tmp_path / "state"))
            return loss

        with script(PLAN):
            tuner = AutoLRS(
                accelerator,
                model,
                optimizer,
                batches,
                step,
                max_steps=STEPS,
                lr_range=(1e-3, 1.0),
                progress=False,
            )
            if load:
                accelerator.load_state(str(tmp_path / "state"))
            for _, batch in zip(range(STEPS), itertools.chain(batches, batches), strict=False):
                tuner.step(batch)
        return model

    whole, saving = run(saves=False), run(saves=True)
    assert torch.equal(saving.layer.weight, whole.layer.weight)
    saved = load_file(tmp_path / "state" / "model.safetensors")
    assert torch.equal(saved["layer.weight"], Net().layer.weight)
    assert torch.equal(run(saves=False, load=True).layer.weight, whole.layer.weight)


@pytest.mark.parametrize("metric", [None, "eval_b_loss"])
def test_several_validation_sets_of_a_trainer_need_a_metric_of_one(
    metric: str | None, tmp_path: Path
) -> None:
    plan = (*PLAN[:1], Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=True), *PLAN[3:])
    sets = {"a": Numbered(), "b": Numbered()}
    tuner = AutoLRSCallback((1e-3, 1.0), progress=False, metric=metric)
    trainer = Trainer(
        Net(), arguments(tmp_path), train_dataset=Numbered(), eval_dataset=sets, callbacks=[tuner]
    )
    with script(plan):
        if metric is None:
            with pytest.raises(ValueError, match=r"does not produce it; it gives eval_a_loss, eval_b_loss"):
                trainer.train()
        else:
            trainer.train()
    assert trainer.state.global_step == (STEPS if metric else 0)


@pytest.mark.parametrize("metric", [None, "val_loss/dataloader_idx_1"])
def test_several_validation_loaders_of_lightning_need_a_metric_of_one(
    metric: str | None, tmp_path: Path
) -> None:
    class Validating(Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def val_dataloader(self) -> list[DataLoader]:
            return [loader(), loader()]

    tuner = LightningCallback((1e-3, 1.0), progress=False, metric=metric)
    plan = (*PLAN[:1], Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=True), *PLAN[3:])
    trainer = LightningTrainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[tuner], enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with script(plan):
        if metric is None:
            with pytest.raises(
                ValueError, match=r"does not log it; it logs val_loss/dataloader_idx_0, val_loss"
            ):
                trainer.fit(Validating(), loader())
        else:
            trainer.fit(Validating(), loader())
    assert trainer.global_step == (STEPS if metric else 0)


def test_a_group_that_lightning_adds_later_is_taken_along(tmp_path: Path) -> None:
    """As its finetuning callbacks do where they let more layers train."""

    class Adds(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.late.requires_grad_(True)
                optimizer = trainer.optimizers[0]
                rate = optimizer.param_groups[0]["lr"] / 10
                optimizer.add_param_group({"params": [pl_module.late], "lr": rate})

    class Growing(Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.zeros(2), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0], batch[1]), batch_idx) + (self.late - 1).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.layer.parameters(), lr=0.05)

    plan = (*PLAN[:4], Train(0, (0.05,) * 9), *PLAN[:4], Train(9, (0.05,) * 3))
    found = []
    for tuned_too in (False, True):
        module = Growing()
        callbacks = [LightningCallback((1e-3, 1.0), progress=False)] if tuned_too else []
        trainer = LightningTrainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[*callbacks, Adds()], enable_checkpointing=False,
        )  # fmt: skip
        with script(plan):
            trainer.fit(module, loader())
        assert trainer.optimizers[0].param_groups[1]["lr"] == pytest.approx(0.005)
        found.append((bits(module.layer.weight), bits(module.late)))
    assert found[0] == found[1]
    assert module.late.abs().min() > 0


def test_a_data_set_that_streams_is_that_of_the_run_without(tmp_path: Path) -> None:
    """What it has come to is that of the iterator begun last, a probe's, and load_state_dict() tells the next one."""

    def data() -> HFDataset:
        rows = HFDataset.from_dict({"x": X.tolist(), "labels": Y.tolist()})
        return rows.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=20)

    found = []
    for callbacks in ([], [tuned()]):
        torch.manual_seed(0)
        SEEN.clear()
        options = {"lr_scheduler_type": "constant", "learning_rate": 0.05}
        sets = {"train_dataset": data(), "eval_dataset": data()}
        trainer: Any = Trainer(Net(), arguments(tmp_path, **options), **sets, callbacks=callbacks)
        with script(EVALUATING):
            trainer.train()
        found.append((SEEN[-STEPS:], bits(trainer.model.layer.weight), sets["train_dataset"].state_dict()))
    assert callbacks[0].ledger.search.steps == PROBED
    assert found[0] == found[1]


class Memory:
    """An object of a Trainer's own."""

    def __init__(self) -> None:
        self.count, self.bank = 0, torch.zeros(2)


class Distilling(Trainer):
    """Has a momentum teacher, an object and a count in its class, and uses all in its loss."""

    seen = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self).seen = 0
        self.memory, self.teacher = Memory(), copy.deepcopy(cast(Net, self.model)).requires_grad_(False)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out, far = model(**inputs), self.teacher(**inputs)["logits"]
        type(self).seen += 1
        self.memory.count += 1
        self.memory.bank = self.memory.bank * 0.9 + out["logits"].detach().mean(0)
        for p, q in zip(self.teacher.parameters(), model.parameters(), strict=True):
            p.data.lerp_(q.data, 0.05)
        pull = (self.memory.bank * out["logits"]).sum() / (self.memory.count + self.seen)
        return out["loss"] + (out["logits"] - far).square().mean() + 1e-3 * pull


def test_what_a_trainer_of_the_users_own_holds_is_that_of_the_run_without(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [tuned()]):
        torch.manual_seed(0)
        options = {"lr_scheduler_type": "constant", "learning_rate": 0.05}
        trainer: Any = Distilling(
            Net(), arguments(tmp_path, **options), train_dataset=Numbered(), callbacks=callbacks
        )
        with script(PLAN):
            trainer.train()
        weights = trainer.model.layer.weight, trainer.teacher.layer.weight, trainer.memory.bank
        found.append([*map(bits, weights), trainer.memory.count, Distilling.seen])
    assert callbacks[0].ledger.search.steps == PROBED
    assert found[0] == found[1]


class Failing(Trainer):
    """Runs out of memory at its call of number `at`, once."""

    at = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        CALLS.held.append(1)
        if len(CALLS.held) == self.at:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("at", [2, 6, PROBED + 4], ids=["first probe", "second probe", "real step"])
def test_a_trainer_that_runs_out_of_memory_begins_again(at: int, tmp_path: Path) -> None:
    Failing.at = at
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
        trainer: Any = Trainer(
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
