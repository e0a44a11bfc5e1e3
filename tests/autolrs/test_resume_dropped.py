"""What a step deletes or switches on the way is so after a resume, too; or the resume is refused by a sentence."""

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of
from tests.autolrs.test_references import ONES, Thing, check_resumed, stopped


def attributes() -> Any:
    at = types.SimpleNamespace(count=0, warm=5.0, thing=Thing(3.0))

    def use() -> Any:
        at.count += 1
        if at.count == 2:
            del at.warm, at.thing
        return getattr(at, "warm", 1.0) + hasattr(at, "thing"), ONES

    return use


def items() -> Any:
    by_name = {"a": Thing(1.0), "b": Thing(2.0)}
    things, count = [Thing(1.0), Thing(2.0), Thing(3.0)], torch.zeros(1)

    def use() -> Any:
        count.add_(1)
        if count == 2:
            del by_name["a"], things[1:]
        return 10.0 * len(by_name) + len(things), ONES

    return use


def a_variable() -> Any:
    warm, count = 5.0, 0

    def use() -> Any:
        nonlocal warm, count
        count += 1
        if count == 2:
            del warm
        try:
            return warm, ONES
        except NameError:
            return 1.0, ONES

    return use


def a_child_and_a_buffer() -> Any:
    blocks = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    blocks.register_buffer("scale", torch.ones(1))
    count = torch.zeros(1)

    def use() -> Any:
        count.add_(1)
        if count == 2:
            del blocks["a"], blocks.scale
        return 10.0 * len(blocks) + hasattr(blocks, "scale"), ONES

    return use


@pytest.mark.parametrize(
    "make", [attributes, items, a_variable, a_child_and_a_buffer], ids=lambda m: m.__name__
)
def test_what_a_step_has_deleted_is_gone_after_a_resume(make: Callable[[], Any], tmp_path: Path) -> None:
    check_resumed(make, tmp_path)


class Auxiliary(Kind):
    """A second head that is dropped after the first steps; the optimizer still has its parameters."""

    def prepare(self) -> None:
        self.model.aux = nn.Linear(8, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.count = 0

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        out = self.model.head(self.model.norm(self.model.body(self.x[index])))
        loss = cross_entropy(out, self.y[index])
        if hasattr(self.model, "aux"):
            loss = loss + cross_entropy(self.model.aux(self.model.body(self.x[index])), self.y[index])
        return loss

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.count += 1
        if self.count == 2:
            del self.model.aux


def test_a_head_that_a_step_has_dropped_is_gone_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = plainly(Auxiliary())
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        stopped(Auxiliary(), tmp_path, 6)
        job = Auxiliary()
        with script(PLAN):
            tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == whole
    assert not hasattr(job.model, "aux")
    assert not [m for m in caplog.messages if "cannot make anew" in m]


class Switching(Kind):
    """A step that turns a setting of the process on, for good."""

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        torch.set_float32_matmul_precision("medium")


def test_a_setting_that_a_step_has_changed_is_asked_for_at_a_resume(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        stopped(Switching(), tmp_path, 1)
        torch.set_float32_matmul_precision(before)
        named = rf"run_dir: .* torch\.get_float32_matmul_precision\(\) is medium there and {before} here; set"
        with script(PLAN), pytest.raises(ValueError, match=named):
            tuner_of(Switching(), run_dir=tmp_path)
        torch.set_float32_matmul_precision("medium")
        job = Switching()
        with script(PLAN):
            tuner_of(job, run_dir=tmp_path).run()
        assert everything(job) == plainly(Switching())
    finally:
        torch.set_float32_matmul_precision(before)
