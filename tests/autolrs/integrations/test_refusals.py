"""What an adapter cannot work with is refused before any training, by a sentence that says what and why."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from autolrs_plugin import AutoLRS as PlainAutoLRS
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.journal import JournalError
from autolrs_plugin.integrations.accelerate import AutoLRS, check_accelerator
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.integrations import task, with_lightning, with_trainer
from tests.autolrs.scripted import script
from tests.test_house import BLOCKER, ROOT


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield task.Pictures()[0]


def trainer(
    folder: Path, callbacks: list[Any], model: Any = None, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    objects = {
        "train_dataset": task.Pictures(),
        "eval_dataset": task.Pictures(task.VALIDATION),
        **{k: options.pop(k) for k in ("train_dataset", "eval_dataset", "optimizers") if k in options},
    }
    settings = {"max_steps": 4, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(str(folder), **{**settings, **options})
    return kind(model or task.Net(), args, callbacks=callbacks, **objects)


def test_the_settings_are_looked_at_first() -> None:
    for build in (AutoLRSCallback, LightningCallback):
        with pytest.raises(ConfigError, match=r"AutoLRSCallback: unknown setting 'serach_budget'"):
            build(task.RANGE, serach_budget=0.1)  # type: ignore[call-arg]
        with pytest.raises(ConfigError, match=r"lr_range=\(1.0, 0.1\): is reversed"):
            build((1.0, 0.1))
        with pytest.raises(ConfigError, match=r"'max_steps' is no setting here; the framework's own"):
            build(task.RANGE, max_steps=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type='cosine': conflicts with AutoLRS"),
        (
            {"train_dataset": Endless(), "max_steps": -1},
            r"does not implement __len__.*max_steps has to be specified",
        ),
        ({"model": task.Net().half()}, r"fp16: trains without a gradient scaler"),
    ],
    ids=["scheduler", "no length", "fp16"],
)
def test_a_trainer_that_cannot_be_tuned(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE)], **options)


def test_a_trainer_with_a_scheduler_of_its_own_or_two_callbacks(tmp_path: Path) -> None:
    model = task.Net()
    optimizer = task.make_optimizer(model)
    both = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match=r"optimizers: has a scheduler, which conflicts"):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE)], model=model, optimizers=both)
    with pytest.raises(ValueError, match=r"callbacks: has 2 AutoLRSCallbacks"):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE), AutoLRSCallback(task.RANGE)])
    with pytest.raises(ValueError, match=r"metric='eval_loss': needs an eval_dataset"):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE, metric="eval_loss")], eval_dataset=None)
    with pytest.raises(ValueError, match=r"Trainer: its training loss is no measure of progress"):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE, loss_is_progress=False)])


def test_a_warm_up_of_the_trainers_is_told_to_be_unused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "autolrs_plugin"):
        trainer(tmp_path, [AutoLRSCallback(task.RANGE)], warmup_steps=3)
    assert "warmup_steps=3: is not used" in caplog.text


def test_deepspeed_and_fsdp1_are_refused_by_a_sentence_that_says_what_works() -> None:
    class Told:
        is_fsdp2, num_processes = False, 2
        distributed_type = "DistributedType.DEEPSPEED"

    for kind, sentence in (
        ("DEEPSPEED", r"train with DDP, or with FSDP2"),
        ("FSDP", r"use fsdp_version: 2, or DDP"),
    ):
        Told.distributed_type = f"DistributedType.{kind}"
        with pytest.raises(RuntimeError, match=sentence):
            check_accelerator(Told(), task.Net())

    class DeepSpeedStrategy:
        optimizers: ClassVar[list[Any]] = []
        lr_scheduler_configs: ClassVar[list[Any]] = []

    callback, module = LightningCallback(task.RANGE), with_lightning.Module(0.0, False, None)
    lightning_trainer = LightningTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    lightning_trainer.strategy.optimizers = [task.make_optimizer(module.net)]
    lightning_trainer._accelerator_connector.strategy = DeepSpeedStrategy()
    DeepSpeedStrategy.optimizers = [task.make_optimizer(module.net)]
    with pytest.raises(RuntimeError, match=r"strategy: DeepSpeedStrategy .* train with 'ddp'"):
        callback.on_fit_start(lightning_trainer, module)


def test_a_metric_that_evaluation_does_not_produce(tmp_path: Path) -> None:
    model = task.Net()
    refused = trainer(tmp_path, [AutoLRSCallback(task.RANGE, metric="eval_bleu")], model=model)
    with pytest.raises(
        ValueError, match=r"metric='eval_bleu': evaluation does not produce it; it gives eval_loss\."
    ):
        refused.train()
    assert model.trained_on() == []
    callback = LightningCallback(task.RANGE, metric="bleu")
    with pytest.raises(ValueError, match=r"metric='bleu': validation does not log it; it logs val_loss\."):
        lightning(tmp_path, [callback])


def test_a_default_metric_that_is_not_there_or_not_finite_shows_before_any_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = task.Net()
    several = {"a": task.Pictures(task.VALIDATION), "b": task.Pictures(task.VALIDATION)}
    refused = trainer(tmp_path, [AutoLRSCallback(task.RANGE)], model=model, eval_dataset=several)
    with pytest.raises(
        ValueError, match=r"metric='eval_loss': evaluation does not produce it; it gives eval_a_"
    ):
        refused.train()
    assert model.trained_on() == []

    class Other(with_lightning.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.net(**batch)["loss"])

    class NotFinite(with_lightning.Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float("nan"))

    data = task.loader(task.Pictures())
    options = {"logger": with_lightning.ListLogger()}
    module = Other(0.0, False, data)
    with pytest.raises(
        ValueError, match=r"metric='val_loss': validation does not log it; it logs val/loss\."
    ):
        lightning(tmp_path, [LightningCallback(task.RANGE)], module, **options)
    assert module.net.trained_on() == []
    with script(task.PROBING[5:6]), caplog.at_level("WARNING", "autolrs_plugin"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], NotFinite(0.0, False, data), **options)
    assert caplog.text.count("metric='val_loss': is nan before any training; as long as it is not") == 1


class Late(TrainerCallback):
    """Adds a callback during training."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.add_callback(AutoLRSCallback(task.RANGE))


def test_training_that_has_already_started(tmp_path: Path) -> None:
    late = Late()
    late.trainer = trainer(tmp_path, [late])
    with pytest.raises(RuntimeError, match=r"was added to a Trainer that has already started"):
        late.trainer.train()
    later = trainer(tmp_path, [])
    later.add_callback(AutoLRSCallback(task.RANGE))
    with pytest.raises(ValueError, match=r"give the callback to the Trainer's constructor"):
        later.train()
    with script(task.PROBING):
        callback = AutoLRSCallback(task.RANGE, progress=False)
        again = trainer(tmp_path, [callback], max_steps=task.STEPS)
        again.train()
        with pytest.raises(RuntimeError, match=r"AutoLRSCallback: has tuned 9 steps already; make a new one"):
            again.train()
        with_trainer.run(tmp_path, None, replay=task.RATES)
        with pytest.raises(
            RuntimeError, match=r"already started \(it is at step 3\) and the checkpoint holds no"
        ):
            with_trainer.run(tmp_path, {}, resume=3)


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    with script(task.PROBING):
        with_trainer.run(tmp_path, {"seed": 1})
        with pytest.raises(
            JournalError, match=r"is of another run: its setting 'seed' is 1, and here it is 2"
        ):
            with_trainer.run(tmp_path, {"seed": 2}, resume=3)


def lightning(
    folder: Path, callbacks: list[Any], module: LightningModule | None = None, **options: Any
) -> None:
    module = module or with_lightning.Module(0.0, False, task.loader(task.Pictures()))
    settings = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": folder}
    LightningTrainer(callbacks=callbacks, **{**settings, **quiet, **options}).fit(module)


def with_optimizers(make: Callable[[Any], Any]) -> LightningModule:
    module = with_lightning.Module(0.0, False, task.loader(task.Pictures()))
    module.configure_optimizers = lambda: make(  # type: ignore[method-assign]
        task.make_optimizer(module.net)
    )
    return module


def test_a_lightning_trainer_that_cannot_be_tuned(tmp_path: Path) -> None:
    scheduled = with_optimizers(lambda o: ([o], [torch.optim.lr_scheduler.ConstantLR(o)]))
    with pytest.raises(ValueError, match=r"configure_optimizers: returns a ConstantLR, which conflicts"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], scheduled)
    none = with_optimizers(lambda o: None)
    with pytest.raises(ValueError, match=r"configure_optimizers: returns no optimizer; AutoLRS needs one"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], none)
    twice = [LightningCallback(task.RANGE), LightningCallback((1e-3, 1.0))]
    with pytest.raises(ValueError, match=r"callbacks: has 2 AutoLRSCallbacks; a run has one learning rate"):
        lightning(tmp_path, twice)
    two = with_optimizers(lambda o: [o, o])
    two.automatic_optimization = False
    with pytest.raises(ValueError, match=r"configure_optimizers: returns 2 optimizers"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], two)
    endless = with_lightning.Module(0.0, False, torch.utils.data.DataLoader(Endless(), batch_size=8))
    with pytest.raises(ValueError, match=r"max_steps: is not given and the train dataloader has no length"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], endless, max_steps=-1, max_epochs=2)
    halves = with_lightning.Module(0.0, False, task.loader(task.Pictures())).half()
    with pytest.raises(ValueError, match=r"trains without a gradient scaler"):
        lightning(tmp_path, [LightningCallback(task.RANGE)], halves)
    assert halves.net.trained_on() == endless.net.trained_on() == scheduled.net.trained_on() == []


def test_a_rate_that_a_module_or_a_trainer_sets_itself_ends_the_run(tmp_path: Path) -> None:
    def assign(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.003

    class Assigning(with_lightning.Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assign(optimizer)

    class AssigningTrainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            assign(self.optimizer)
            return super().training_step(*args, **kwargs)

    says = r"param_groups\[0\] \(AdamW\) was set to .*, and the step was taken at 0.003"
    for plan in (task.PROBING, task.PROBING[1:]):  # the first step is the run's own, or a probe's
        with script(plan):
            module = Assigning(0.0, False, task.loader(task.Pictures()))
            with pytest.raises(RuntimeError, match=says):
                lightning(
                    tmp_path, [LightningCallback(task.RANGE)], module, logger=with_lightning.ListLogger()
                )
            refused = trainer(tmp_path, [AutoLRSCallback(task.RANGE)], kind=AssigningTrainer)
            with pytest.raises(RuntimeError, match=says):
                refused.train()


def test_an_accelerator_that_cannot_be_tuned() -> None:
    def build(scheduler: bool = False, prepare: bool = True, steps: int = 0) -> AutoLRS:
        accelerator, model = Accelerator(cpu=True), task.Net()
        things: Any = [model, task.make_optimizer(model), task.loader(task.Pictures())]
        if prepare:
            things = list(accelerator.prepare(*things))
        if scheduler:
            accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(things[1]))
        for _ in range(steps):
            model(**next(iter(things[2])))["loss"].backward()
            things[1].step()
        options: dict[str, Any] = {"max_steps": 4, "lr_range": task.RANGE, "progress": False}
        model, optimizer, loader = things
        tuner = AutoLRS(accelerator, model, optimizer, loader, lambda batch: batch, **options)
        with pytest.raises(ValueError, match=r"accelerator: has an AutoLRS already"):
            AutoLRS(accelerator, model, optimizer, loader, lambda batch: batch, **options)
        return tuner

    with pytest.raises(TypeError, match=r"optimizer: an AdamW; give what accelerator\.prepare returned"):
        build(prepare=False)
    with pytest.raises(ValueError, match=r"accelerator: has prepared a ConstantLR, which conflicts"):
        build(scheduler=True)
    with pytest.raises(RuntimeError, match=r"AutoLRS: training has already started"):
        build(steps=1).step({})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"accelerator": 3}, r"accelerator: an int is no accelerate\.Accelerator"),
        ({"model": [1]}, r"model: a list is no torch\.nn\.Module; give what accelerator\.prepare returned"),
        ({"optimizer": [1]}, r"optimizer: a list; give what accelerator\.prepare returned"),
        ({"train_step": 3}, r"train_step: an int cannot be called"),
        ({"train_step": lambda: 0.0}, r"train_step: takes no batch"),
        ({"validate": 3}, r"validate: an int cannot be called"),
        ({"validate": lambda model: 0.0}, r"validate: needs an argument"),
        ({"stateful": [1]}, r"stateful: a list has no names; give a dictionary"),
        ({"generators": 3}, r"generators: an int is not a list"),
    ],
)
def test_what_is_given_beside_an_accelerator_is_looked_at(given: dict[str, Any], says: str) -> None:
    accelerator, model = Accelerator(cpu=True), task.Net()
    names = ("model", "optimizer", "loader")
    prepared = accelerator.prepare(model, task.make_optimizer(model), task.loader(task.Pictures()))
    arguments = dict(zip(names, prepared, strict=True), accelerator=accelerator, train_step=lambda batch: 0.0)
    with pytest.raises(TypeError, match=says):
        AutoLRS(**{**arguments, "max_steps": 4, "lr_range": task.RANGE, **given})


def test_callbacks_look_at_what_is_to_be_rolled_back() -> None:
    for callback in (AutoLRSCallback, LightningCallback):
        with pytest.raises(TypeError, match=r"stateful: a list has no names; give a dictionary"):
            callback(task.RANGE, stateful=[torch.nn.Linear(1, 1)])  # type: ignore[arg-type]


def test_a_validation_that_is_not_finite_beside_an_accelerator_shows_before_any_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator, model = Accelerator(cpu=True), task.Net()
    prepared = accelerator.prepare(model, task.make_optimizer(model), task.loader(task.Pictures()))
    trained: list[str] = []

    def step(batch: Any) -> float:
        trained.append(caplog.text)
        return 1.0

    with script(task.PROBING[5:6]):
        tuner = AutoLRS(
            *(accelerator, *prepared, step),
            max_steps=4,
            lr_range=task.RANGE,
            progress=False,
            validate=lambda: float("nan"),
        )
        with caplog.at_level("WARNING", "autolrs_plugin"):
            tuner.step({})
    assert "validate: is nan before any training" in trained[0]


def test_where_a_run_is_saved_nothing_is_lost(tmp_path: Path) -> None:
    with script(task.PROBING):
        callback = AutoLRSCallback(task.RANGE, progress=False)
        trainer(tmp_path, [callback], max_steps=task.STEPS).train()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir='.*file': is a file; give a folder"):
        callback.save(tmp_path / "file")
    model = task.Net()
    plain: dict[str, Any] = {
        "max_steps": 4,
        "lr_range": task.RANGE,
        "train_step": lambda: 1.0,
        "progress": False,
    }
    PlainAutoLRS(model, task.make_optimizer(model), run_dir=tmp_path / "plain", **plain).close()
    with pytest.raises(
        ValueError, match=r"plain': holds a run that can be resumed, which this would replace"
    ):
        callback.save(tmp_path / "plain")
    for _ in range(2):  # its own may be replaced
        callback.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "journal.jsonl").exists()


WITHOUT = """
for name in {names!r}:
    try:
        importlib.import_module("autolrs_plugin.integrations." + name)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_without_its_framework_an_adapter_names_the_extra() -> None:
    """In one process, for it is torch's import that takes long."""
    names = ["transformers", "lightning", "accelerate"]
    code = BLOCKER.format(blocked=set(names), names=[]) + WITHOUT.format(names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    for name, said in zip(names, done.stdout.splitlines(), strict=True):
        assert f"pip install 'vllm-sarathi[autolrs,{name}]'" in said
