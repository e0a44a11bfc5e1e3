"""What a step makes on the way is named when a state is written, and a resume that has it not is refused."""

import copy
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Probe, Restore, Snapshot, Train
from tests.autolrs.jobs import Job
from tests.autolrs.scripted import script

PLAN: tuple[Action, ...] = (
    Snapshot(),
    Probe(0, 0, (0.5,) * 2, float("inf"), evaluate=False),
    Restore(),
    Train(0, (0.05,) * 2),
    Train(2, (0.04,) * 2),
)


class Running:
    """A running mean, as rewards are normalised with."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(64), 0

    def update(self, inputs: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean += (inputs.flatten(1).mean(0) - self.mean) / self.count
        return self.mean.mean()


class Trainer:
    """A job whose step makes something at its first call."""

    def __init__(self, begin: Callable[["Trainer"], Any] | None = None) -> None:
        torch.manual_seed(0)
        self.job = Job("sgd")
        self.norm: Any = None
        self.norms: dict[str, Any] = {}
        self.plain: dict[str, Any] = {}
        self.begin = begin or Trainer.attribute

    def attribute(self) -> Any:
        if self.norm is None:
            self.norm = Running()
        return self.norm

    def of_the_model(self) -> Any:
        if not hasattr(self.job.model, "running"):
            self.job.model.running = Running()
        return self.job.model.running

    def in_a_dictionary(self) -> Any:
        return self.norms.setdefault("all", Running())

    def step(self) -> torch.Tensor:
        job, norm = self.job, self.begin(self)
        job.optimizer.zero_grad()
        shift = norm.update(job.inputs) if isinstance(norm, Running) else 0.0
        loss = (job.model(job.inputs) - shift).square().mean()
        loss.backward()
        job.optimizer.step()
        return loss.detach()

    def tuner(self, run_dir: Path | None = None) -> AutoLRS:
        with script(PLAN):
            return AutoLRS(
                self.job.model, self.job.optimizer, train_step=self.step, max_steps=4, lr_range=(1e-3, 1.0),
                run_dir=run_dir, prior=0.05, progress=False,
            )  # fmt: skip

    def bits(self) -> Any:
        return self.job.bits()


def stopped(trainer: Trainer, run_dir: Path, actions: int = 4) -> None:
    tuner = trainer.tuner(run_dir)
    for _ in range(actions):
        tuner.tell(tuner.perform(tuner.next_action()))
    tuner.close()


def ema(trainer: Trainer) -> Any:
    """Begin an average of the weights."""
    if trainer.norm is None:
        trainer.norm = AveragedModel(trainer.job.model)
    trainer.norm.update_parameters(trainer.job.model)


def teacher(trainer: Trainer) -> Any:
    """Begin a teacher."""
    if trainer.norm is None:
        trainer.norm = copy.deepcopy(trainer.job.model).requires_grad_(False)


def optimizer(trainer: Trainer) -> Any:
    """Begin a second optimizer."""
    if trainer.norm is None:
        trainer.norm = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])


def group(trainer: Trainer) -> Any:
    """Add a group of parameters."""
    if trainer.norm is None:
        trainer.norm = "added"
        trainer.job.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def objects(trainer: Trainer) -> Any:
    """Keep objects in a queue."""
    trainer.norms.setdefault("last", deque(maxlen=3)).append(Running())


AGAIN = r"make it before AutoLRS is made, and a resume puts its values back\."
ANEW = "begin a new run, and make it before AutoLRS is made there"


@pytest.mark.parametrize(
    ("begin", "name", "advice"),
    [
        (Trainer.attribute, r"train_step\.self\.norm \(a Running\)", AGAIN),
        (Trainer.of_the_model, r"running \(a Running\)", AGAIN),
        (Trainer.in_a_dictionary, r"train_step\.self\.norms\.\['all'\] \(a Running\)", AGAIN),
        (objects, r"train_step\.self\.norms\.\['last'\]\.\[0\] \(a Running\)", AGAIN),
        (ema, r"train_step\.self\.norm \(an AveragedModel, a module\)", ANEW),
        (teacher, r"train_step\.self\.norm \(a Net, a module\)", ANEW),
        (optimizer, r"train_step\.self\.norm \(an Adam, an optimizer\)", ANEW),
        (group, r"optimizer\.param_groups\[2\] \(a parameter group\)", ANEW),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_step_makes_is_named_and_a_resume_without_it_refused(
    begin: Callable[[Trainer], Any],
    name: str,
    advice: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        stopped(Trainer(begin), tmp_path, actions=5)
    (warning,) = [text for text in caplog.messages if text.startswith("run_dir: ")]
    assert "so this run cannot be resumed as it is; make it before AutoLRS is made" in warning
    fresh = Trainer(begin)
    before = fresh.bits()
    with pytest.raises(ValueError, match=rf"run_dir: .*{name}.*; it is not in this process, .*{advice}"):
        fresh.tuner(tmp_path)
    assert fresh.bits() == before


@pytest.mark.parametrize("begin", [Trainer.attribute, Trainer.of_the_model, Trainer.in_a_dictionary])
def test_made_before_a_resume_it_has_the_values_of_the_run(
    begin: Callable[[Trainer], Any], tmp_path: Path
) -> None:
    wanted = Trainer(begin)
    wanted.tuner().run()
    stopped(Trainer(begin), tmp_path)
    trainer = Trainer(begin)
    begin(trainer)
    trainer.tuner(tmp_path).run()
    assert (trainer.bits(), begin(trainer).count) == (wanted.bits(), begin(wanted).count)


def test_what_has_no_state_of_its_own_may_be_made_on_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A list of what there is anyway, a loss, a function, a generator, which a resume makes, and plain values."""

    def begin(trainer: Trainer) -> Any:
        if not trainer.norms:
            trainer.norms["parameters"] = list(trainer.job.model.parameters())
            trainer.norms["loss"] = torch.nn.MSELoss()
            trainer.norms["function"] = torch.relu
        if trainer.norm is None:
            trainer.plain = {"seen": [torch.zeros(2)], "count": 0}
            trainer.norm = torch.Generator().manual_seed(3)
        trainer.plain["count"] += 1
        trainer.job.model.norm.weight.grad = torch.rand(4, generator=trainer.norm)

    wanted = Trainer(begin)
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        wanted.tuner().run()
        stopped(Trainer(begin), tmp_path)
        trainer = Trainer(begin)
        trainer.tuner(tmp_path).run()
    assert not [text for text in caplog.messages if text.startswith("run_dir: ")]
    assert trainer.bits() == wanted.bits()
    assert trainer.norm.get_state().tolist() == wanted.norm.get_state().tolist()
    assert trainer.plain["count"] == 4


def test_a_long_container_that_was_short_at_first_is_filled_again(tmp_path: Path) -> None:
    """Beyond the length that is copied with what holds it, its items have a place of their own."""

    def begin(trainer: Trainer) -> Any:
        queue = trainer.plain.setdefault("queue", deque())
        queue.extend(range(len(queue), len(queue) + 6_000))

    stopped(Trainer(begin), tmp_path)
    trainer = Trainer(begin)
    trainer.plain["queue"] = deque()
    trainer.tuner(tmp_path).run()
    assert list(trainer.plain["queue"]) == list(range(24_000))
