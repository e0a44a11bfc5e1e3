"""Runs in a loop that is not ours: what cannot be taken back, early ends, and what is let go of."""

import contextlib
import gc
import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import GradientState
from lightning.pytorch import Trainer as LightningTrainer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from autolrs_plugin.core.actions import Action, Restore, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.plans.training import train
from autolrs_plugin.core.state import RunState
from autolrs_plugin.integrations.accelerate import probe_batches
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.integrations import task, with_lightning, with_trainer
from tests.autolrs.scripted import script


@pytest.mark.parametrize("rewind", [True, False])
def test_a_hosted_run_goes_on_at_a_lower_rate_where_it_cannot_go_back(rewind: bool) -> None:
    state = RunState(AutoLRSConfig(200, (1e-4, 1.0), rewind=rewind, search_budget=1.0, validation=False))
    plan = train(state, lambda step: 0.1, 30, above=10.0)
    actions: list[Action] = []
    action = next(plan)
    with contextlib.suppress(StopIteration):
        while True:
            actions.append(action)
            result = Result()
            if isinstance(action, Train):
                first = not any(isinstance(a, Train) for a in actions[:-1])
                result = Result((math.nan if first else 1.0,) * len(action.lrs))
            state.observe(action, result)
            action = plan.send(result)
    assert state.step == 30
    assert any(isinstance(action, Snapshot | Restore) for action in actions) == rewind
    assert state.lrs == ([0.05] * 30 if rewind else [0.1] * 10 + [0.05] * 20)
    assert state.ledger.train.steps == 30
    assert state.ledger.search.steps == (10 if rewind else 0)


def test_accelerate_knows_nothing_of_a_probe_afterwards() -> None:
    GradientState._reset_state()  # it is shared by all of a process: loaders that other tests left are none of ours
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(task.loader(task.Pictures()))
    gradients, batches = accelerator.gradient_state, iter(loader)
    next(batches)
    known = gradients.dataloader_references
    gradients._set_sync_gradients(False)
    with probe_batches(accelerator, skip_first_batches(loader), 3) as others:
        next(others)
        assert gradients.active_dataloader is not loader
        gradients._set_sync_gradients(True)
    assert gradients.active_dataloader is loader
    assert len(gradients.dataloader_references) == len(known)
    assert not gradients.sync_gradients
    assert len(list(batches)) == task.SAMPLES // task.BATCH - 1
    assert not gradients.in_dataloader


class Diverging(task.Net):
    """Its loss is no number for the rest of the run, after some batches."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().forward(x, labels, index)
        if self.training and int(self.count) > 3 * task.BATCH:
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {"max_steps": task.STEPS, "per_device_train_batch_size": task.BATCH, "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **quiet, **options})


def test_a_loss_that_the_trainer_hides_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuner = AutoLRSCallback(task.RANGE, progress=False)
    plan = [Train(0, (0.05,) * 5), Train(5, (0.05,) * 4)]
    with script(plan), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        Trainer(Diverging(), arguments(tmp_path), train_dataset=task.Pictures(), callbacks=[tuner]).train()
    assert "not finite between the steps 0 and 5" in caplog.text
    assert tuner.run is not None
    assert [math.isnan(loss) for loss in tuner.run.controller.losses] == [False] * 3 + [True] * 6


def test_a_run_that_the_trainer_stops_early(tmp_path: Path) -> None:
    def worse(_: Any) -> dict[str, float]:
        evaluations.append(1)
        return {"badness": float(len(evaluations))}

    evaluations: list[int] = []
    tuner = AutoLRSCallback(task.RANGE, progress=False)
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "badness", "save_steps": 1}
    with script(task.PROBING):
        trainer = Trainer(
            task.Net(),
            arguments(
                tmp_path,
                **options,
                greater_is_better=False,
                save_strategy="steps",
                load_best_model_at_end=True,
            ),
            train_dataset=task.Pictures(),
            eval_dataset=task.Pictures(task.VALIDATION),
            compute_metrics=worse,
            callbacks=[tuner, EarlyStoppingCallback(2)],
        )
        trainer.train()
    assert (
        trainer.state.global_step == len(tuner.schedule) == 3
    )  # two evaluations without progress, ours not counted
    assert tuner.schedule.lrs == task.RATES[:3]


def test_more_steps_than_were_told_keep_the_last_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with script([Train(0, (0.05, 0.02))]), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        outcome = with_trainer.run(tmp_path, {}, steps=4)
    assert [rates[0] for rates in outcome.rates] == [0.05, 0.02, 0.02, 0.02]
    assert "takes more steps than the 4" in caplog.text


def test_a_callback_that_the_trainer_makes_anew_goes_on(tmp_path: Path) -> None:
    with script(task.PROBING):
        whole = with_trainer.run(tmp_path, {})
        resumed = with_trainer.run(tmp_path, {}, resume=4, restore_callback_states_from_checkpoint=True)
    assert resumed.bits == whole.bits


def test_nothing_of_the_framework_is_held_afterwards(tmp_path: Path) -> None:
    """Only what was found stays with the callback."""
    models: list[weakref.ref[Any]] = []
    tuners = AutoLRSCallback(task.RANGE, progress=False), LightningCallback(task.RANGE, progress=False)

    def train_twice() -> None:
        model = task.Net()
        data = {"train_dataset": task.Pictures(), "eval_dataset": task.Pictures(task.VALIDATION)}
        Trainer(model, arguments(tmp_path), **data, callbacks=[tuners[0]]).train()
        module = with_lightning.Module(0.0, False, task.loader(task.Pictures()))
        quiet: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        options: dict[str, Any] = {
            "max_steps": task.STEPS,
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
        }
        logger = with_lightning.ListLogger()
        LightningTrainer(**options, **quiet, logger=logger, callbacks=[tuners[1]]).fit(module)
        models.extend([weakref.ref(model), weakref.ref(module)])

    with script(task.PROBING):
        train_twice()
    gc.collect()
    assert [model() for model in models] == [None, None]
    assert [tuner.schedule.lrs for tuner in tuners] == [task.RATES] * 2
