"""A learning rate alone, and a warm start: on a real job, and from the command line."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from autolrs_plugin import AutoLRS
from autolrs_plugin.cli import app
from autolrs_plugin.cli.find import find
from autolrs_plugin.core import finding as autolrs_finding
from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.finding import Finding, finding
from autolrs_plugin.core.journal import FILE_NAME, Journal, journal_text
from autolrs_plugin.core.replay import plateau_of
from autolrs_plugin.core.state import Candidate, RunState, Stage
from autolrs_plugin.integrations.torch_loop import FIND_SHARE
from autolrs_plugin.training.finding_only import FoundError, finding_only, to_find
from autolrs_plugin.training.settings import HostedSettings
from tests.autolrs.jobs import Job, batch_step, loader
from tests.autolrs.test_torch_loop import seed_everything


def tuner_of(job: Job, **changes: Any) -> AutoLRS:
    arguments: dict[str, Any] = {
        "max_steps": 400,
        "lr_range": (1e-6, 10.0),
        "train_step": batch_step(job),
        "train_data": loader(job),
        "progress": False,
    }
    return AutoLRS(job.model, job.optimizer, **{**arguments, **changes})


def test_find_says_what_helps() -> None:
    flat = (1.0,) * 40
    assert "give a larger share" in found_with(flat, mode="find", search_budget=0.03).reason
    everything = found_with(flat, mode="find", search_budget=1.0).reason
    assert "the share is all of max_steps=800, so it takes a longer run" in everything
    assert "so give its script to find with" in found_with(flat).reason
    for loss, says in (
        (math.nan, "look into the loss and the data"),
        (1e9, "give an lr_range with a lower end"),
    ):
        probe = Candidate(1e-3, (1e-3,), (loss,), None, math.inf, 0.01)
        state = RunState(AutoLRSConfig(max_steps=800, lr_range=(1e-6, 10.0), mode="find"))
        state.stages.append(Stage(0, 0, "find", (probe,) * 5, 1e-3, 5, "", 1e-6, 10.0))
        assert "all 5 probes diverged" in (reason := finding(state).reason)
        assert says in reason
        assert "share" not in reason


@pytest.mark.parametrize("share", [FIND_SHARE, 0.1])
@pytest.mark.parametrize("validates", [False, True])
def test_the_least_steps_for_a_share_are_those_that_the_documents_name(share: float, validates: bool) -> None:
    def tells(steps: int) -> bool:
        config = AutoLRSConfig(max_steps=steps, lr_range=(1e-6, 10.0), validation=validates)
        controller = Controller(to_find(config, share))
        controller.next()
        controller.tell(Result())
        probe = controller.next()
        assert isinstance(probe, Probe)
        return len(probe.lrs) >= autolrs_finding.LEAST_STEPS

    least = f"{next(steps for steps in range(900, 9000) if tells(steps)):,}"
    tutorial = (Path(__file__).parents[2] / "docs/tutorials/fine-tuning.md").read_text(encoding="utf-8")
    assert least in tutorial
    assert least in str(AutoLRS.find.__doc__)
    assert re.search(rf"{share:g}\b", str(find.__doc__))
    assert least in str(find.__doc__) or not validates


@dataclass
class Earlier:
    """A run in a folder, to its end."""

    folder: Path
    job: Job
    tuner: AutoLRS


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    folder = tmp_path_factory.mktemp("earlier") / "one"
    seed_everything()
    tuner = tuner_of(job := Job("adam", seed=3), run_dir=folder)
    tuner.run()
    tuner.close()
    return Earlier(folder, job, tuner)


def journal_of(earlier: Earlier) -> Journal:
    return Journal.read(earlier.folder / FILE_NAME)


def test_find_takes_everything_back_and_the_run_after_it_is_the_run_without_it(earlier: Earlier) -> None:
    job = Job("adam", seed=3)
    seed_everything()
    tuner, before = tuner_of(job), job.bits()
    found = tuner.find(0.1)
    assert job.bits() == before
    assert 0 < found.steps <= 40
    assert found.low <= found.lr <= found.high
    tuner.run()
    assert (job.bits(), tuner.losses) == (earlier.job.bits(), earlier.tuner.losses)


def test_find_says_when_it_knows_nothing() -> None:
    nothing = tuner_of(Job("adam", seed=3)).find(0.01)
    assert not nothing.confident
    assert nothing.lr == 1e-2  # the optimizer's own
    assert "has no room for three probes; give a larger share (share=, --share)" in str(nothing)

    job = Job("adam", seed=3)

    def step(batch: Any) -> torch.Tensor:
        return batch_step(job)(batch) * 0 + 2.3 + 0.1 * torch.randn(())  # noise alone

    seed_everything()
    noise = tuner_of(job, train_step=step).find(0.1)
    assert not noise.confident
    assert "no learning rate to rely on" in str(noise)


def test_find_comes_before_the_run() -> None:
    tuner = tuner_of(Job("adam", seed=3))
    tuner.tell(tuner.perform(tuner.next_action()))
    with pytest.raises(RuntimeError, match="the run has begun"):
        tuner.find()
    with pytest.raises(ConfigError, match=r"share=2: must be a fraction"):
        tuner_of(Job("adam")).find(2)


def test_a_finding_without_a_stage_is_the_prior() -> None:
    found = finding(RunState(AutoLRSConfig(max_steps=100, lr_range=(1e-4, 1.0), prior_lr=3e-3)))
    assert (found.lr, found.confident) == (3e-3, False)
    middle = finding(RunState(AutoLRSConfig(max_steps=100, lr_range=(1e-4, 1.0))))
    assert middle.lr == pytest.approx(1e-2)


def found_with(losses: tuple[float, ...], **settings: Any) -> Finding:
    """Return what three probes say, of which only the second may have gained something."""
    state = RunState(AutoLRSConfig(max_steps=800, lr_range=(1e-6, 10.0), prior_lr=1e-3, **settings))
    probes = [
        Candidate(lr, (lr,) * 40, curve, None, float(np.mean(curve[-12:])), 0.01)
        for lr, curve in ((1e-3, (1.0,) * 40), (1e-2, losses), (1e-1, (1.0,) * 40))
    ]
    state.stages.append(Stage(0, 0, "find", tuple(probes), 1e-2, 120, "one is lower", 3e-3, 3e-2))
    return finding(state)


def test_a_probe_that_rises_before_it_falls_is_not_noise() -> None:
    falling = np.linspace(1.0, 0.1, 37)
    rising_first = (1.0, 3.0, 1.2, *falling)
    assert found_with(rising_first).confident
    with patch.object(autolrs_finding, "_scatter", lambda losses: float(np.std(np.diff(losses)))):
        assert not found_with(rising_first).confident
    noise = 1.0 + 0.3 * np.random.default_rng(0).standard_normal(40)
    assert not found_with(tuple(map(float, noise))).confident


def found_among(
    *probes: Candidate, max_steps: int = 800, chosen: float = 1e-2, decades: float = 0.3
) -> Finding:
    """Return what probes say together, whose as good rates lie within some decades up and down of the chosen one."""
    state = RunState(AutoLRSConfig(max_steps=max_steps, lr_range=(1e-6, 1.0), mode="find"))
    as_good = chosen / 10**decades, chosen * 10**decades
    state.stages.append(Stage(0, 0, "find", probes, chosen, 120, "one is lower", *as_good))
    return finding(state)


def probe_of(lr: float, end: float, curve: float = 1.0, held: bool = True, steps: int = 40) -> Candidate:
    """Return a probe from 1.0 down to `end`; the higher `curve`, the sooner it falls. One not held ends on `end`."""
    losses = 1.0 + (end - 1.0) * np.linspace(0.0, 1.0, steps) ** (1 / curve)
    forecast = float(losses[-12:].mean()) if held else math.inf
    return Candidate(lr, (lr,) * steps, tuple(map(float, losses)), None, forecast, 0.02)


def test_a_best_rate_at_the_edge_of_what_is_known_is_no_rate_to_rely_on() -> None:
    low, best, high = probe_of(1e-3, 0.9), probe_of(1e-2, 0.2), probe_of(1e-1, 0.5)
    assert found_among(low, best, high).confident
    exploded = probe_of(1e-1, 3.0, held=False, steps=9)
    assert found_among(low, best, exploded).confident
    stopped = probe_of(3e-2, 1.05, held=False, steps=9)  # above the reference's losses, and no more
    assert "the next one, 0.03, was ended before it had diverged" in found_among(low, best, stopped).reason
    lower = probe_of(1e-4, 0.95)
    assert "0.01, is the highest one; give" in found_among(lower, low, best).reason
    assert "0.01, is the lowest one; give" in found_among(best, high, probe_of(0.3, 0.9)).reason
    as_good = probe_of(3e-3, 0.21)
    assert found_among(lower, as_good, best).confident
    last = probe_of(1.0, 0.1)
    assert "at an end of lr_range; give a wider range" in found_among(low, best, last, chosen=0.3).reason


def test_rates_that_are_all_as_good_are_no_rate_to_rely_on() -> None:
    probes = probe_of(1e-3, 0.9), probe_of(1e-2, 0.2), probe_of(1e-1, 0.5)
    assert "rates over 1.4 decades are about equally good" in found_among(*probes, decades=0.7).reason


def test_a_probe_at_its_floor_says_little_of_a_far_longer_run() -> None:
    low, high = probe_of(1e-3, 0.9), probe_of(1e-1, 0.5, curve=9.0)
    at_floor = probe_of(1e-2, 0.2, curve=9.0)
    assert found_among(low, at_floor, high).confident
    assert "the loss had stopped falling" in found_among(low, at_floor, high, max_steps=4000).reason
    assert found_among(low, probe_of(1e-2, 0.2), high, max_steps=4000).confident
    exploded = probe_of(1e-1, 1.4, held=False, steps=9)
    assert found_among(low, probe_of(1e-2, 0.2), exploded).confident
    assert "before it had diverged" in found_among(low, probe_of(1e-2, 0.2), exploded, max_steps=4000).reason


def test_a_warm_start_follows_the_earlier_run(earlier: Earlier, tmp_path: Path) -> None:
    first = earlier.tuner
    points = plateau_of(journal_of(earlier))
    assert points[0][0] == 0.0
    assert all(math.isclose(lr, first.schedule.lrs[round(at * 400)], rel_tol=0.06) for at, lr in points[1:])
    assert all(after - before > 0.01 for (before, _), (after, _) in pairwise(points))
    seed_everything()
    second = tuner_of(Job("adam", seed=4), warm_start=earlier.folder)
    second.run()
    assert second.ledger.search_share <= 0.05
    assert max(second.schedule.lrs) == pytest.approx(max(first.schedule.lrs), rel=0.1)
    with pytest.raises(RuntimeError, match=r"warm_start=.*nowhere.: is no folder"):
        tuner_of(Job("adam"), warm_start=tmp_path / "nowhere")


def test_a_warm_start_from_another_kind_of_optimizer_is_warned_of(
    earlier: Earlier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    says = "warm_start: the earlier run was trained with Adam and this one is with SGD"
    adam, sgd = Job("adam"), Job("sgd")
    hosted = HostedSettings.checked("AutoLRSCallback", (1e-6, 10.0), {"warm_start": earlier.folder})
    unnamed = journal_text(AutoLRSConfig(400, (1e-6, 10.0)).to_mapping(), {}, journal_of(earlier).entries)
    (tmp_path / FILE_NAME).write_text(unnamed, encoding="utf-8")
    with caplog.at_level("WARNING", "autolrs_plugin"):
        tuner_of(adam, warm_start=earlier.folder)
        hosted.config(adam.optimizer, 400, False)
        tuner_of(sgd, warm_start=tmp_path)  # a journal that does not have it
        assert "warm_start" not in caplog.text
        tuner_of(sgd, warm_start=earlier.folder)
        assert caplog.text.count(says) == 1
        hosted.config(sgd.optimizer, 400, False)
    assert caplog.text.count(says) == 2


def test_a_warm_start_with_rates_outside_of_the_range_is_refused(earlier: Earlier) -> None:
    rates = [lr for _, lr in plateau_of(journal_of(earlier))]
    says = r"follows learning rates from .* and lr_range=\(.*\) does not hold them all; widen it"
    for lr_range in ((1e-6, max(rates) / 2), (min(rates) * 2, 10.0)):
        with pytest.raises(ConfigError, match=says):
            tuner_of(Job("adam"), warm_start=earlier.folder, lr_range=lr_range)
        with pytest.raises(ConfigError, match=says):
            HostedSettings.checked("AutoLRSCallback", lr_range, {"warm_start": earlier.folder})
    at_the_end = (1e-6, max(rates) * (1 - 1e-12))  # as rounding leaves it
    assert tuner_of(Job("adam"), warm_start=earlier.folder, lr_range=at_the_end).next_action()


def test_only_finding_leaves_nothing_in_the_folders_and_does_not_look_at_a_run_there(
    earlier: Earlier, tmp_path: Path
) -> None:
    before = sorted((path.name, path.read_bytes()) for path in earlier.folder.iterdir())
    for folder in (tmp_path / "new", earlier.folder):
        with finding_only(0.1):  # seed 4: a script that sets no seed has other weights each time
            tuner = tuner_of(Job("adam", seed=4), run_dir=folder, tensorboard=tmp_path / "events")
        with pytest.raises(FoundError):
            tuner.run()
    assert not list(tmp_path.iterdir())
    assert sorted((path.name, path.read_bytes()) for path in earlier.folder.iterdir()) == before


@pytest.mark.parametrize("begin", [AutoLRS.run, AutoLRS.next_action])
def test_only_what_is_made_inside_only_finds(begin: Any) -> None:
    with finding_only(0.1):
        inside = tuner_of(Job("adam", seed=3))
    outside = tuner_of(Job("adam", seed=3))
    with pytest.raises(FoundError) as found:
        begin(inside)
    assert found.value.finding == outside.find(0.1)
    assert not inside.losses
    begin(outside)


SCRIPT = """
import torch
from autolrs_plugin import AutoLRS
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
inputs = torch.randn(256, 8)
targets = inputs.sum(1, keepdim=True) + torch.randn(256, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
def step(rows):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs[rows]), targets[rows])
    loss.backward()
    optimizer.step()
    return loss
tuner = AutoLRS(model, optimizer, max_steps=1000, lr_range=(1e-6, 10.0), train_step=step,
                train_data=list(torch.arange(256).split(32)), progress=False)
tuner.run()
raise SystemExit("it trained")
"""


def test_find_from_the_command_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    runner = CliRunner()
    found = runner.invoke(app, ["find", str(script), "--share", "0.15"])
    assert found.exit_code == 0, found.output
    lr = float(found.output.split(",")[0])
    assert 3e-3 < lr < 1.0  # it diverges above about 1
    little = runner.invoke(app, ["find", str(script), "--share", "0.005"])
    assert little.exit_code == 1
    assert "give a larger share" in little.output
    script.write_text("print('no training here')", encoding="utf-8")
    none = runner.invoke(app, ["find", str(script)])
    assert none.exit_code == 2
    assert "has come to its end without AutoLRS.run()" in none.output
    script.write_text("import no_such_module_here", encoding="utf-8")
    imports = runner.invoke(app, ["find", str(script)])
    assert imports.exit_code == 2
    assert "train.py': imports no_such_module_here, which this Python does not have" in imports.output
    missing = runner.invoke(app, ["find", str(tmp_path / "nowhere.py")])
    assert missing.exit_code == 2
    assert "is neither a script nor the folder of a run" in missing.output


def test_find_looks_at_a_run(earlier: Earlier) -> None:
    refused = CliRunner().invoke(app, ["find", str(earlier.folder), "--share", "0.9"])
    assert refused.exit_code == 2
    assert "is the folder of a run, where nothing is searched for; give its script" in refused.output
    printed = CliRunner().invoke(app, ["find", str(earlier.folder)])
    assert printed.exit_code in (0, 1)
    assert (
        f"{earlier.tuner.stages[-1].chosen_lr:.3g}" in printed.output
        or "no learning rate to rely on" in printed.output
    )
