"""What is asked for in a way that cannot be: a sentence, or a warning, says what can be."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.datapipes.iter import IterableWrapper

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Train
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.journal import JournalError
from tests.autolrs.scripted import RATES, script
from tests.autolrs.test_inventory import Kind, tuner_of


def test_what_is_asked_for_at_the_wrong_time_or_with_no_number_is_refused_by_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"resume=True: needs the folder"):
        tuner_of(Kind(), resume=True)
    tuner = tuner_of(Kind())
    with pytest.raises(RuntimeError, match=r"restore\(\): no state is kept yet"):
        tuner.restore()
    for rate in (-1, "x", float("nan"), True):
        with pytest.raises(ValueError, match=r"set_lr\(.*\): must be a finite learning rate"):
            tuner.set_lr(rate)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"share=2: must be a fraction"):
        tuner.find(share=2)
    tuner.next_action()
    with pytest.raises(ValueError, match=r"perform\(3\): is not the action"):
        tuner.perform(3)  # type: ignore[arg-type]


def test_a_loader_over_a_datapipe_is_refused_by_a_sentence() -> None:
    job = Kind()
    job.data = DataLoader(IterableWrapper(list(range(64))), batch_size=16)
    with pytest.raises(TypeError, match=r"train_data: is a DataLoader over a datapipe"):
        tuner_of(job)


def test_a_scheduler_in_the_step_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    job = Kind()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(job.optimizer, 7)
    job.after = lambda loss, index: scheduler.step()  # type: ignore[method-assign]
    with script([Train(0, RATES[:2]), Train(2, RATES[2:])]):
        tuner_of(job).run()
    assert caplog.text.count("has set the learning rate after its step") == 1


def test_an_optimizer_that_only_looks_like_one_is_refused_by_what_there_is_instead() -> None:
    schedulefree, model = pytest.importorskip("schedulefree"), nn.Linear(2, 2)
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"ScheduleFreeWrapper is no torch.* AdamWScheduleFree"):
        AutoLRS(model, wrapper, max_steps=7, lr_range=(1e-3, 1.0), progress=False)


def test_an_optimizer_that_gathers_statistics_first_is_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedulefree, job = pytest.importorskip("schedulefree"), Kind()
    job.optimizer = schedulefree.RAdamScheduleFree(job.model.parameters(), lr=0.1)
    job.optimizer.train()
    with script([Train(0, RATES[:2]), Train(2, RATES[2:])]):
        tuner_of(job, validate=None).run()
    assert "has changed no weight" not in caplog.text


def test_lightning_under_its_other_name() -> None:
    code = (
        "import pytorch_lightning; from autolrs_plugin.integrations.lightning import AutoLRSCallback; "
        "assert issubclass(AutoLRSCallback, pytorch_lightning.Callback)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(
        JournalError, match=r"run_dir='/proc/none': cannot be made \(.*\); give a folder that can"
    ):
        tuner_of(Kind(), run_dir="/proc/none")
