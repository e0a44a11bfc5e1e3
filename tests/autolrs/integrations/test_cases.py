"""Faults that users of such tools report, in runs that are long enough to search: nothing here is scripted."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Probe
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.integrations.task import OneLayer
from tests.autolrs.jobs import bits, outside

STEPS = 160
RANGE = (1e-4, 1.0)
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Job:
    """A linear model, trained on batches of 8."""

    def __init__(self, build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 2)
        self.optimizer = build(self.model)
        self.calls = 0

    def step(self, index: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(X[index]), Y[index])
        loss.backward()
        self.optimizer.step()
        return loss

    def tuner(self, **options: Any) -> AutoLRS:
        arguments = {
            "max_steps": STEPS,
            "lr_range": RANGE,
            "train_step": self.step,
            "progress": False,
            **options,
        }
        return AutoLRS(self.model, self.optimizer, train_data=list(torch.arange(64).split(8)), **arguments)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


class Holding(torch.optim.Optimizer):
    """Holds Muon and AdamW in a list, with their groups as its own or with one of its own."""

    def __init__(self, model: nn.Module, shared: bool) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
        super().__init__(list(model.parameters()), {"lr": 1e-3})
        if shared:
            self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]

    def step(self, closure: Any = None) -> None:
        for inner in self.optimizers:
            inner.step()

    def rates(self) -> list[float]:
        return [float(group["lr"]) for inner in self.optimizers for group in inner.param_groups]


@pytest.mark.parametrize("shared", [True, False], ids=["groups of the inner ones", "a group of its own"])
def test_f02_optimizers_in_a_list_are_rolled_back_and_have_the_rate(shared: bool) -> None:
    job = Job(lambda model: Holding(model, shared))
    used: list[list[float]] = []
    plain = job.step
    tuner = job.tuner(train_step=lambda index: (used.append(job.optimizer.rates()), plain(index))[1])
    steps = 0
    while steps == 0 or tuner.ledger.search.steps == 0:
        action = tuner.next_action()
        tuner.tell(tuner.perform(action))
        steps = len(tuner.schedule)
    tuner.run()
    assert tuner.ledger.search.steps > 0
    inner = job.optimizer.optimizers
    assert [state["step"].item() for state in inner[1].state.values()] == [STEPS]
    assert all(rates[0] == pytest.approx(rates[1]) for rates in used)
    assert job.optimizer.rates() == pytest.approx([tuner.schedule.lrs[-1]] * 2)
    replayed = Job(lambda model: Holding(model, shared))
    for index, lr in enumerate(tuner.schedule.lrs):
        for group in [
            *replayed.optimizer.param_groups,
            *(g for o in replayed.optimizer.optimizers for g in o.param_groups),
        ]:
            group["lr"] = lr
        replayed.step(torch.arange(64).split(8)[index % 8])
    assert bits(job.model.weight) == bits(replayed.model.weight)


@pytest.mark.parametrize(
    "unit",
    [lambda loss: loss, lambda loss: math.exp(4 * loss), lambda loss: 256 * loss],
    ids=["CE", "exp", "sum"],
)
def test_f07_the_unit_of_a_validation_makes_no_probe_diverge(unit: Callable[[float], float]) -> None:
    def run(value: Callable[[float], float]) -> AutoLRS:
        job = Job(adamw)

        def validate() -> float:
            with torch.no_grad():
                return value(cross_entropy(job.model(X), Y).item())

        tuner = job.tuner(validate=validate, max_steps=400)
        tuner.run()
        return tuner

    def probes(tuner: AutoLRS) -> list[tuple[float, bool]]:
        return [(c.lr, c.diverged) for stage in tuner.stages for c in stage.candidates]

    tuner, plain = run(unit), run(lambda loss: loss)
    assert len(tuner.val_losses) == 5
    assert probes(tuner)[0] == probes(plain)[0]
    assert sum(not diverged for _, diverged in probes(tuner)) >= 2
    assert [lr for lr, diverged in probes(tuner) if diverged and lr < 0.5] == []  # that trains well
    assert max(plain.schedule.lrs) / 3 < max(tuner.schedule.lrs) < max(plain.schedule.lrs) * 3


@pytest.mark.parametrize("number", [2, 11, 20])
def test_f13a_ctrl_c_in_a_probe_leaves_the_real_step(number: int) -> None:
    """A real signal, during a step of a probe."""
    job, calls = Job(adamw), outside([])
    plain = job.step

    def step(index: torch.Tensor) -> torch.Tensor:
        loss = plain(index)
        calls.held.append(1.0)
        if len(calls.held) == interrupted:
            signal.raise_signal(signal.SIGINT)
        return loss

    tuner = job.tuner(train_step=step)
    interrupted = 0
    while not isinstance(action := tuner.next_action(), Probe):
        tuner.tell(tuner.perform(action))
    before = bits(job.model.weight), len(job.optimizer.state), job.optimizer.param_groups[0]["lr"]
    interrupted = len(calls.held) + min(number, len(action.lrs))
    with pytest.raises(KeyboardInterrupt):
        tuner.perform(action)
    assert (bits(job.model.weight), len(job.optimizer.state), job.optimizer.param_groups[0]["lr"]) == before
    tuner.run()
    whole = Job(adamw)
    whole_tuner = whole.tuner()
    whole_tuner.run()
    assert whole_tuner.ledger.search.steps > 0
    assert bits(job.model.weight) == bits(whole.model.weight)


class Module(LightningModule):
    """Counts its batches in a metric; skips some, or takes those of two loaders, or calls a hook."""

    def __init__(self, hook: Callable[[Any], None] = lambda module: None, skips: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.hook, self.skips = nn.Linear(8, 2), hook, skips
        self.rows = pytest.importorskip("torchmetrics").SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hook(self)
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        if self.skips and parts[0][0].sum() > 3:
            return None
        self.rows(float(len(parts[0][1])))
        self.log("rows", self.rows, on_step=False, on_epoch=True)
        return sum(cross_entropy(self.layer(x), y) for x, y in parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Replay(Callback):
    """Trains at given rates: what a run without AutoLRS does that has its schedule."""

    def __init__(self, lrs: Any) -> None:
        self.lrs = lrs

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.lrs[min(trainer.global_step, len(self.lrs) - 1)]


class Epochs(Callback):
    def __init__(self) -> None:
        self.rows: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rows.append(float(trainer.callback_metrics["rows"]))


def fit(
    module: LightningModule, data: Any, folder: Path, *callbacks: Callback, checkpoint: Any = None
) -> None:
    LightningTrainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=False,
    ).fit(module, data, ckpt_path=checkpoint)  # fmt: skip


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


@pytest.mark.parametrize("kind", ["f04 a metric", "f09 two loaders", "f15 skipped batches"])
def test_a_lightning_run_is_the_replay_of_its_schedule(kind: str, tmp_path: Path) -> None:
    def data() -> Any:
        return {"a": loader(), "b": loader()} if "f09" in kind else loader()

    tuner, tuned, replayed = LightningCallback(RANGE, progress=False), Epochs(), Epochs()
    module, again = Module(skips="f15" in kind), Module(skips="f15" in kind)
    fit(module, data(), tmp_path, tuner, tuned)
    assert tuner.ledger.search.steps > 0
    assert len(tuner.schedule) == STEPS
    fit(again, data(), tmp_path, Replay(tuner.schedule.lrs), replayed)
    assert bits(module.layer.weight) == bits(again.layer.weight)
    assert tuned.rows == replayed.rows
    if "f15" not in kind:
        assert tuned.rows == [64.0] * (STEPS // 8)


def test_f13e_a_checkpoint_of_a_signal_handler_in_a_probe_is_of_the_real_step(tmp_path: Path) -> None:
    steps = outside([])
    weights: dict[int, bytes] = {}

    def save(module: Any) -> None:
        steps.held.append(module.trainer.global_step)
        if steps.held[-3:] == steps.held[-1:] * 3 and not (tmp_path / "asked.ckpt").exists():  # in a probe
            module.trainer.save_checkpoint(tmp_path / "asked.ckpt")
        weights[steps.held[-1]] = bits(module.layer.weight)  # in the end, those of the real step

    module, whole, resumed = Module(save), Module(), Module()
    tuner = LightningCallback(RANGE, progress=False)
    fit(module, loader(), tmp_path, tuner)
    assert len(steps.held) == STEPS + tuner.ledger.search.steps
    state = torch.load(tmp_path / "asked.ckpt", weights_only=True)
    assert bits(state["state_dict"]["layer.weight"]) == weights[state["global_step"]]
    assert {s["step"].item() for s in state["optimizer_states"][0]["state"].values()} == {
        state["global_step"]
    }
    assert any("AutoLRS" in name for name in state["callbacks"])
    plain = LightningCallback(RANGE, progress=False)
    fit(whole, loader(), tmp_path, plain)
    assert plain.ledger.search.steps == tuner.ledger.search.steps > 0
    fit(
        resumed,
        loader(),
        tmp_path,
        LightningCallback(RANGE, progress=False),
        checkpoint=tmp_path / "asked.ckpt",
    )
    assert bits(module.layer.weight) == bits(whole.layer.weight) == bits(resumed.layer.weight)


def test_f05_schedule_free_with_validation_is_the_replay_of_its_schedule() -> None:
    free = pytest.importorskip("schedulefree")

    def made() -> Job:
        return Job(lambda model: free.AdamWScheduleFree(model.parameters(), lr=1e-3))

    job = made()
    job.optimizer.train()

    def validate() -> float:
        job.optimizer.eval()
        with torch.no_grad():
            loss = cross_entropy(job.model(X), Y).item()
        job.optimizer.train()
        return loss

    tuner = job.tuner(validate=validate, max_steps=400)
    tuner.run()
    assert tuner.ledger.search.steps > 0
    assert len(tuner.val_losses) > 0
    replayed = made()
    replayed.optimizer.train()
    for index, lr in enumerate(tuner.schedule.lrs):
        replayed.optimizer.param_groups[0]["lr"] = lr
        replayed.step(torch.arange(64).split(8)[index % 8])
    for each in (job, replayed):
        each.optimizer.eval()
    assert bits(job.model.weight) == bits(replayed.model.weight)


class SeeingNet(OneLayer):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        SEEN.append(float(x.sum()))
        return super().forward(x, labels)


SEEN: list[float] = []


class Rows(torch.utils.data.Dataset):
    """Is told of epochs."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i] + self.epoch, "labels": int(Y[i])}


class Lazy:
    """Makes its generator at its first call."""

    generator: torch.Generator | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(42)
        x = torch.stack([item["x"] for item in items])
        noise = torch.rand(x.shape, generator=self.generator)
        return {"x": x + noise, "labels": torch.tensor([item["labels"] for item in items])}


def test_f10_f11_the_batches_of_a_trainer_are_those_of_the_run_without(tmp_path: Path) -> None:
    seen: list[Any] = []
    tuner: Any = AutoLRSCallback(RANGE, progress=False)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=8,
    )  # fmt: skip
    for callbacks in ([], [tuner]):
        SEEN.clear()
        torch.manual_seed(0)
        Trainer(
            SeeingNet(), arguments, train_dataset=Rows(), data_collator=Lazy(), callbacks=callbacks
        ).train()
        seen.append(list(SEEN))
    searched = tuner.ledger.search.steps
    assert searched > 0
    assert len(seen[1]) == STEPS + searched
    rest = iter(seen[1])
    assert all(batch in rest for batch in seen[0])  # in this order, with those of the probes between them
