"""An evaluation that AutoLRS asks for leaves no trace; those of the run itself count as they do without it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from autolrs_plugin.core.actions import Action, Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.integrations.accelerate import AutoLRS
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.integrations.task import OneLayer
from tests.autolrs.jobs import bits
from tests.autolrs.scripted import script

PLAN: tuple[Action, ...] = (
    Train(0, (0.05,) * 3),
    Evaluate(3),
    Snapshot(),
    Probe(0, 0, (0.5,) * 2, float("inf"), evaluate=True),
    Restore(),
    Train(3, (0.05,) * 4),
    Evaluate(7),
    Train(7, (0.05,) * 5),
    Evaluate(12),
)
STEPS = 12
X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Counted(Dataset):
    """Rows that depend on how many have been asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.asked += 1
        return {"x": X[i] * (1 + 0.01 * self.asked), "labels": int(Y[i])}


class Collator:
    """What it returns depends on its calls, for training and for evaluation."""

    def __init__(self) -> None:
        self.calls, self.generator = 0, None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.generator = self.generator or torch.Generator().manual_seed(42)
        x = torch.stack([item["x"] for item in items]) + 0.01 * self.calls
        noise = torch.rand(x.shape, generator=self.generator)
        return {"x": x + noise, "labels": torch.tensor([item["labels"] for item in items])}


class Score:
    """A metric of the user's own, which counts what it has judged."""

    def __init__(self) -> None:
        self.judged, self.best = 0, 0.0

    def __call__(self, found: Any) -> dict[str, float]:
        self.judged += len(found.predictions)
        self.best = max(self.best, float((found.predictions.argmax(1) == found.label_ids).mean()))
        return {"score": self.best + self.judged}


class Average:
    """Made at the first step of a Trainer."""

    def __init__(self) -> None:
        self.of = torch.zeros(2)


class Own(Trainer):
    """Uses an object that it makes when it first needs it, and a generator."""

    average: Average | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise, self.numbers = np.random.default_rng(0), itertools.count()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.average is None:
            self.average = Average()
        loss, out = super().compute_loss(model, inputs, return_outputs=True)
        self.average.of = 0.9 * self.average.of + 0.1 * out["logits"].detach().mean(0)
        noise = 0.1 * float(self.noise.random()) + 0.01 * next(self.numbers)
        loss = loss * (1 + noise) + 0.1 * (out["logits"] @ self.average.of).mean()
        return (loss, out) if kwargs.get("return_outputs") or (args and args[0]) else loss


class Watch(TrainerCallback):
    """Notes what the run's own evaluations come to."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.found.append((state.global_step, metrics["eval_loss"], metrics["eval_score"]))


def options(folder: Path, **more: Any) -> TrainingArguments:
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    rates = {"lr_scheduler_type": "constant", "learning_rate": 0.05, "max_steps": STEPS}
    return TrainingArguments(str(folder), per_device_train_batch_size=8, **{**quiet, **rates, **more})


@pytest.mark.parametrize(
    "evaluates", [False, True], ids=["no evaluation of its own", "evaluations of its own"]
)
def test_evaluations_in_a_trainer_leave_no_trace(evaluates: bool, tmp_path: Path) -> None:
    found = []
    own = {"eval_strategy": "steps", "eval_steps": 4} if evaluates else {}
    tuned = AutoLRSCallback((1e-3, 1.0), progress=False)
    for tuner in (None, tuned):
        watch, collator, score, judged = Watch(), Collator(), Score(), Counted()
        trainer: Any = Own(
            OneLayer(), options(tmp_path, **own), train_dataset=Counted(), eval_dataset=judged, data_collator=collator,
            compute_metrics=score, callbacks=[watch, *([tuner] if tuner else [])],
        )  # fmt: skip
        loaders = len(trainer.accelerator._dataloaders)
        with script(PLAN):
            trainer.train()
        counts = [collator.calls, score.judged, score.best, judged.asked, next(trainer.numbers)]
        made = len(trainer.accelerator._dataloaders) - loaders
        state = [bits(trainer.model.layer.weight), bits(trainer.average.of), trainer.noise.random()]
        found.append([watch.found, counts, state, made, torch.get_rng_state().tolist()])
    assert len(tuned.schedule) == STEPS
    assert len(watch.found) == 3 * evaluates
    assert found[0] == found[1]


def test_persistent_workers_of_a_trainers_evaluations_are_the_runs_own(tmp_path: Path) -> None:
    """What a worker counts nobody can set back: ours have workers of their own, which end with them."""
    found = []
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    own = {"eval_strategy": "steps", "eval_steps": 6, **workers}
    for callbacks in ([], [AutoLRSCallback((1e-3, 1.0), progress=False)]):
        watch = Watch()
        trainer = Trainer(
            OneLayer(), options(tmp_path, **own), train_dataset=TensorRows(), eval_dataset=Counted(),
            compute_metrics=Score(), callbacks=[watch, *callbacks],
        )  # fmt: skip
        with script(PLAN):
            trainer.train()
        found.append(watch.found)
        del trainer
    assert len(found[0]) == 2
    assert found[0] == found[1]


class TensorRows(Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "labels": int(Y[i])}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.validated = nn.Linear(8, 2), 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.layer(batch["x"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1
        self.log("val_loss", self.training_step(batch, batch_idx) + 0.01 * self.validated)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Data(LightningDataModule):
    """Counts the batches that it has moved, and makes its validation loaders anew where it is asked to."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.moved, self.made, self.workers = 0, 0, workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorRows(), batch_size=8)

    def val_dataloader(self) -> DataLoader:
        self.made += 1
        return DataLoader(
            Counted(), batch_size=8, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return {**batch, "x": batch["x"] + 0.01 * self.moved}


class Noted(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.found.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


@pytest.mark.parametrize("workers", [0, 1], ids=["in the process", "persistent worker"])
def test_evaluations_in_lightning_leave_no_trace(workers: int, tmp_path: Path) -> None:
    found = []
    for tuner in ([], [LightningCallback((1e-3, 1.0), progress=False)]):
        module, data, noted = Module(), Data(workers), Noted()
        trainer = LightningTrainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[noted, *tuner], num_sanity_val_steps=0,
            check_val_every_n_epoch=1, reload_dataloaders_every_n_epochs=0 if workers else 1,
        )  # fmt: skip
        with script(PLAN):
            trainer.fit(module, data)
        counts = [module.validated, data.moved, data.made]
        found.append([noted.found, counts, bits(module.layer.weight), torch.get_rng_state().tolist()])
    assert len(tuner[0].schedule) == STEPS
    assert len(noted.found) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize("breaks", [False, True], ids=["to the end", "some batches"])
def test_evaluations_on_an_accelerator_leave_no_trace(breaks: bool) -> None:
    """A loader that is left before its end stays the one that Accelerate accumulates by: its end would be missed."""

    def run(tuned: bool) -> list[Any]:
        torch.manual_seed(0)
        accelerator, model, seen = (
            Accelerator(cpu=True, gradient_accumulation_steps=2),
            OneLayer(),
            {"batches": 0},
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        data = DataLoader(TensorDataset(X[:40], Y[:40]), batch_size=8)  # an odd number of batches
        rows = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
        model, optimizer, data, rows = accelerator.prepare(model, optimizer, data, rows)

        def step(batch: Any) -> torch.Tensor:
            seen["batches"] += 1
            with accelerator.accumulate(model):
                loss = model(*batch)["loss"] * (1 + 0.01 * seen["batches"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def validate() -> float:
            losses = []
            with torch.no_grad():
                for batch in rows:
                    seen["batches"] += 1
                    losses.append(float(model(*batch)["loss"]))
                    if breaks and len(losses) == 2:
                        break
            return sum(losses)

        tuner = None
        if tuned:
            tuner = AutoLRS(
                accelerator, model, optimizer, data, step, max_steps=STEPS, lr_range=(1e-3, 1.0), validate=validate,
                progress=False,
            )  # fmt: skip
        steps, own = 0, []
        for epoch in range(4):
            for batch in data:
                tuner.step(batch) if tuner is not None else step(batch)
                steps += accelerator.sync_gradients
            if epoch % 2 and not breaks:
                own.append(validate())
        if tuner is not None:
            assert len(tuner.schedule) == STEPS
        return [own, steps, seen, rows.iteration, bits(model.layer.weight), torch.get_rng_state().tolist()]

    plain = run(False)
    assert plain[1] == STEPS
    with script(PLAN):
        assert run(True) == plain
