"""An exception at random calls inside a probe, in each framework's own loop: the job is what it was before."""

import functools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.autolrs.integrations import task
from tests.autolrs.integrations.test_conformance import FRAMEWORKS, Run
from tests.autolrs.jobs import outside
from tests.autolrs.scripted import script

POINTS = 30
"""Calls at which an exception is raised, in each framework."""

FIRST_PROBE = 4
"""Steps of the first probe; it begins after two steps of the run."""


class Boom(Exception):
    """An error of the user's own."""


class Calls:
    """Counts the calls inside of a probe's forward passes and optimizer steps, and raises at one of them.

    Attributes:
        at: the call that raises, from 1; 0 for none.
        count: calls so far.
        steps: steps of the optimizer that ended.
        before: the job after two of them.
    """

    def __init__(self, at: int, error: type[BaseException] = Boom) -> None:
        self.at, self.error = at, error
        self.count = self.steps = 0
        self.before: Any = None
        self.job: tuple[task.Net, torch.optim.Optimizer] | None = None

    def look(self) -> Any:
        """Return every bit of the job: weights, optimizer, samples trained on, generators."""
        assert self.job is not None
        model, optimizer = self.job
        return task.all_bits(model, optimizer), model.trained_on(), task.random_state()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count the calls made inside, where they are a probe's."""
        if not 2 <= self.steps < 2 + FIRST_PROBE or self.count >= self.at > 0:
            yield
            return
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self.at:
                sys.setprofile(None)
                raise self.error("boom")


@contextmanager
def counted(calls: Calls) -> Iterator[None]:
    """Have all models and optimizers made inside tell `calls` what they do."""
    held = outside(calls)  # a rollback must not set the counts back
    forward, step, make = task.Net.forward, torch.optim.AdamW.step, task.make_optimizer

    @functools.wraps(forward)  # the Trainer looks at its arguments
    def watched_forward(self: task.Net, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return forward(self, *args, **kwargs)
        with held.held.watched():
            return forward(self, *args, **kwargs)

    def watched_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with held.held.watched():
            result = step(self, *args, **kwargs)
        held.held.steps += 1
        if held.held.steps == 2:
            held.held.before = held.held.look()
        return result

    def known(model: task.Net) -> torch.optim.Optimizer:
        optimizer = make(model)
        held.held.job = (model, optimizer)
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.Net, "forward", watched_forward)
        patch.setattr(torch.optim.AdamW, "step", watched_step)
        patch.setattr(task, "make_optimizer", known)
        yield


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_probe_that_raises_anywhere_has_changed_nothing(framework: str, tmp_path: Path) -> None:
    run: Run = FRAMEWORKS[framework]
    for number in range(2):  # the first run makes more calls: it imports, and fills caches
        whole = Calls(at=0)
        with counted(whole), script(task.PROBING):
            run(tmp_path / f"whole-{number}", {})
    assert whole.count > 100
    draw, raised = random.Random(framework), 0
    for number in range(POINTS):
        calls = Calls(draw.randint(1, whole.count), draw.choice((Boom, MemoryError)))
        try:
            with counted(calls), script(task.PROBING):
                run(tmp_path / str(number), {})
        except calls.error:
            raised += 1
        else:
            continue  # it was raised in a destructor: Python prints and forgets that
        assert calls.count == calls.at
        assert calls.look() == calls.before, f"call {calls.at} of {whole.count}"
        assert calls.job is not None
        assert max(task.rates_of(calls.job[1])) in task.RATES
    assert raised >= 0.8 * POINTS, raised
