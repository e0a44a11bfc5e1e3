"""What is known before a hosted run: the rate that its optimizer was built with, and the rates of an earlier run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.config import ConfigError
from autolrs_plugin.core.journal import JournalError
from autolrs_plugin.integrations.lightning import AutoLRSCallback as LightningCallback
from autolrs_plugin.integrations.transformers import AutoLRSCallback
from tests.autolrs.integrations import task, with_trainer
from tests.autolrs.integrations.test_conformance import FRAMEWORKS, Run
from tests.autolrs.scripted import script

STEPS = 120


@pytest.fixture(params=FRAMEWORKS)
def run(request: pytest.FixtureRequest) -> Run:
    return FRAMEWORKS[request.param]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of an earlier run, which kept the rate that its optimizer was built with."""
    model = task.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=40,
        lr_range=task.RANGE,
        train_step=lambda: 1.0,
        run_dir=tmp_path / "earlier",
        progress=False,
    )
    tuner.run()
    tuner.close()
    return tmp_path / "earlier"


@pytest.mark.parametrize(
    ("settings", "rate"), [({}, 0.1), ({"prior": 0.02}, 0.02), ({"prior": None}, math.sqrt(1e-4))]
)
def test_the_first_probe_is_at_the_prior(
    run: Run, settings: dict[str, Any], rate: float, tmp_path: Path
) -> None:
    outcome = run(tmp_path, {"mode": "once", **settings}, steps=STEPS, dropout=0.0)
    assert outcome.stages[0].candidates[0].lr == pytest.approx(rate)


def test_a_warm_start_is_followed_and_hardly_searched(run: Run, earlier: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path, {"warm_start": earlier}, steps=STEPS, dropout=0.0)
    assert [stage.kind for stage in outcome.stages if stage.first_step == 0] == ["warm start"]
    assert outcome.stages[0].candidates[0].lr == pytest.approx(0.02)
    assert outcome.stages[0].search_steps <= 0.1 * STEPS
    assert outcome.schedule[10] == pytest.approx(0.02)


def test_a_callback_that_the_trainer_makes_anew_knows_it_still(earlier: Path, tmp_path: Path) -> None:
    settings = {"prior": 0.03, "warm_start": earlier}
    with script(task.PROBING):
        whole = with_trainer.run(tmp_path, settings)
        resumed = with_trainer.run(tmp_path, settings, resume=4, restore_callback_states_from_checkpoint=True)
    assert resumed.bits == whole.bits


@pytest.mark.parametrize("door", [AutoLRSCallback, LightningCallback])
def test_what_is_no_prior_is_refused_at_once(door: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"prior='adam': must be 'optimizer', a learning rate above 0, or None"
    ):
        door(task.RANGE, prior="adam")
    with pytest.raises(ConfigError, match=r"prior=0: must be 'optimizer', a learning rate above 0"):
        door(task.RANGE, prior=0)
    with pytest.raises(ConfigError, match=r"warm_start=3: must be the folder of an earlier run"):
        door(task.RANGE, warm_start=3)
    with pytest.raises(JournalError, match=r"nowhere.*is no folder"):
        door(task.RANGE, warm_start=tmp_path / "nowhere")
