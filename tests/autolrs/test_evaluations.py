"""An evaluation leaves no trace: what it changes is set back, or named before the run goes on."""

import itertools
import logging
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolrs_plugin.core.actions import Action, Evaluate, Train
from tests.autolrs.jobs import outside
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of


class Shared(Kind):
    """The step and validation go through the same thing, which changes each time, and of which the loss depends."""

    def through(self) -> float:
        """Change the thing; return a number that tells how often that was done."""
        raise NotImplementedError

    def step(self, index: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(index) * (1 + 0.01 * self.through())
        loss.backward()
        self.optimizer.step()
        return loss

    def validate(self) -> float:
        return super().validate() * (1 + 0.01 * self.through())


class OfACounter(Shared):
    def prepare(self) -> None:
        self.counts = {"calls": 0}

    def through(self) -> float:
        self.counts["calls"] += 1
        return self.counts["calls"]

    def seen(self) -> Any:
        return self.counts


class OfACount(Shared):
    """Two of them, at the same place."""

    def prepare(self) -> None:
        self.numbers, self.others = itertools.count(3, 2), itertools.count(3, 2)

    def through(self) -> float:
        return next(self.numbers) - 0.5 * next(self.others)

    def seen(self) -> Any:
        return repr(self.numbers), repr(self.others)


class OfAnObject(Shared):
    """A metric of the user's own, made when it is first needed."""

    def prepare(self) -> None:
        self.metric: Any = None

    def through(self) -> float:
        self.metric = self.metric or Metric()
        self.metric.seen.append(1.0)
        self.metric.total = self.metric.total + 1
        return float(self.metric.total)

    def seen(self) -> Any:
        return self.metric.seen, self.metric.total


class Metric:
    def __init__(self) -> None:
        self.seen, self.total = list[Any](), torch.zeros(())


class OfALoader(Shared):
    """A loader of the user's class tells which pass it is."""

    class Passes(DataLoader):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return super().__iter__()

    def prepare(self) -> None:
        self.loader = self.Passes(TensorDataset(self.x), batch_size=64)

    def through(self) -> float:
        return sum(float(rows.mean()) for (rows,) in self.loader) + self.loader.passes

    def seen(self) -> Any:
        return self.loader.passes


class OfAStateful(Shared):
    """What has a state_dict() is loaded where it has changed, and left alone where it has not."""

    def prepare(self) -> None:
        self.kept = Loaded()
        self.options = {"stateful": {"kept": self.kept}}

    def through(self) -> float:
        return next(self.kept.numbers)

    def seen(self) -> Any:
        return self.kept.state_dict()


class Loaded:
    """Draws from an iterator, which it makes anew to go back: nobody else could set it."""

    def __init__(self) -> None:
        self.numbers = iter(range(1000))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": 1000 - operator.length_hint(self.numbers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        LOADS.append(1)
        self.numbers = iter(range(1000))
        for _ in range(state["drawn"]):
            next(self.numbers)


LOADS: list[int] = []
"""It only grows, so it is a log, which nobody sets back."""


KINDS = [OfACounter, OfACount, OfAnObject, OfALoader, OfAStateful]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_validation_shares_with_the_step_is_that_of_the_run_without(kind: type[Kind]) -> None:
    torch.manual_seed(0)
    plain = plainly(kind())
    torch.manual_seed(0)
    with script(PLAN):
        tuner_of(job := kind()).run()
    assert everything(job) == plain


@pytest.mark.parametrize("kind", [OfACount, OfACounter], ids=lambda kind: kind.__name__)
def test_a_count_goes_on_from_a_folder(kind: type[Kind], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = plainly(kind())
    torch.manual_seed(0)
    with script(PLAN):
        tuner = tuner_of(kind(), run_dir=tmp_path)
        for _ in range(len(PLAN) - 3):
            tuner.tell(tuner.perform(tuner.next_action()))
        tuner.close()
        torch.manual_seed(1)
        tuner_of(job := kind(), run_dir=tmp_path, resume=True).run()
    assert everything(job) == plain


LOOKS: tuple[Action, ...] = (Train(0, (0.1,) * 2), Evaluate(2), Train(2, (0.1,)), Evaluate(3))


def looking(look: Callable[[Kind], Any], prepare: Callable[[Kind], Any] = lambda job: None) -> Any:
    """Return a tuner whose validation looks at something."""
    job = Kind()
    prepare(job)

    def validate() -> float:
        look(job)
        return Kind.validate(job)

    return tuner_of(job, validate=validate, max_steps=3)


@pytest.mark.parametrize("draws", [False, True])
def test_what_is_not_changed_is_not_loaded(draws: bool) -> None:
    LOADS.clear()
    kept = Loaded()
    with script(LOOKS):
        job = Kind()
        tuner = tuner_of(
            job,
            validate=lambda: Kind.validate(job) + (next(kept.numbers) if draws else 0),
            stateful={"kept": kept},
            max_steps=3,
        )
        tuner.run()
    assert len(LOADS) == 2 * draws


def test_what_an_evaluation_cannot_set_back_is_named() -> None:
    numbers = (i for i in range(100))
    with script(LOOKS):
        tuner = looking(lambda job: next(numbers))
        with pytest.raises(
            RuntimeError,
            match=r"numbers \(a generator\): was changed by an evaluation.*without evaluations.*yield",
        ):
            tuner.run()
    assert len(tuner.schedule) == 2


def test_what_only_a_later_evaluation_changes_is_named_then() -> None:
    table, calls = [torch.zeros(1) for _ in range(12_000)], outside([])

    def look(job: Kind) -> None:
        calls.held.append(1)
        table[0] += len(calls.held) > 1

    with script(LOOKS):
        tuner = looking(look)
        with pytest.raises(
            RuntimeError, match=r"table \(a list of 12000 items\): was changed by an evaluation"
        ):
            tuner.run()
    assert len(tuner.schedule) == 3


def test_a_frozen_weight_that_an_evaluation_changes_is_named() -> None:
    def look(job: Any) -> None:
        job.model.table.data += 1

    def prepare(job: Any) -> None:
        job.model.table = nn.Parameter(torch.zeros(3), requires_grad=False)

    with script(LOOKS):
        tuner = looking(look, prepare)
        with pytest.raises(RuntimeError, match=r"table \(a frozen weight\): was changed by an evaluation"):
            tuner.run()


def test_a_record_that_validation_keeps_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    best, losses = {"loss": 9.0}, []

    def look(job: Kind) -> None:
        losses.append(1.0)
        best["loss"] = min(best["loss"], 1.0)

    with script(LOOKS), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        looking(look).run()
    assert (best, len(losses)) == ({"loss": 9.0}, 2)
    assert caplog.text.count("best: was changed by validate, and is set back after each evaluation") == 1
    assert caplog.text.count("losses (a list that grows): grew in an evaluation, and was not set back") == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_count_that_somebody_else_holds_is_named(shared: bool) -> None:
    def stepping(numbers: Any) -> Any:
        def step(index: torch.Tensor) -> torch.Tensor:
            return Kind.step(job, index) * (1 + 0.01 * next(numbers))

        return step

    job, numbers = Kind(), itertools.count()
    job.step = stepping(numbers)  # type: ignore[method-assign]
    if not shared:
        del numbers
    with script(PLAN):
        tuner = tuner_of(job)
        if shared:
            with pytest.raises(
                RuntimeError,
                match=r"itertools\.count\(6\): .* is held by something that AutoLRS does not reach",
            ):
                tuner.run()
            assert next(numbers) == 6
        else:
            tuner.run()
    assert len(tuner.schedule) == (2 if shared else 7)
