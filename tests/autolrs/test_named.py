"""What cannot be set back is named by a sentence, and what the sentence says works."""

import bz2
import decimal
import hashlib
import hmac
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Train
from autolrs_plugin.training.lost import check_same
from autolrs_plugin.training.watched import position
from tests.autolrs.jobs import outside
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of

HERE = os.getcwd()


COMPRESSORS = [zlib.compressobj, bz2.BZ2Compressor, lzma.LZMACompressor]
DECOMPRESSORS: dict[Any, bytes] = {
    zlib.decompressobj: zlib.compress(b"some text"),
    bz2.BZ2Decompressor: bz2.compress(b"some text"),
    lzma.LZMADecompressor: lzma.compress(b"some text"),
}
"""With a stream."""


def fed(stream: bytes) -> Callable[[Any], None]:
    """Return a function that feeds the next byte of a stream."""
    calls = outside([])

    def feed(decompressor: Any) -> None:
        calls.held.append(1)
        decompressor.decompress(stream[len(calls.held) - 1 : len(calls.held)])

    return feed


class Unfreezing(Kind):
    """Lets its first layer train from the fourth step on, which comes in a probe first."""

    given = True

    def prepare(self) -> None:
        self.model.body.requires_grad_(False)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.count = torch.optim.AdamW(parameters, lr=0.1), 0
        self.options = {"stateful": {"layers": self.model.body}} if self.given else {}

    def step(self, index: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == 4:
            self.model.body.requires_grad_(True)
            rate = self.optimizer.param_groups[0]["lr"] / 10
            self.optimizer.add_param_group({"params": list(self.model.body.parameters()), "lr": rate})
        return super().step(index)

    def seen(self) -> Any:
        return self.count, [p.requires_grad for p in self.model.parameters()]


def test_layers_that_a_probe_lets_train_are_taken_back_where_they_are_given() -> None:
    torch.manual_seed(0)
    plain = plainly(Unfreezing())
    torch.manual_seed(0)
    with script(PLAN):
        tuner_of(job := Unfreezing()).run()
    assert len(job.rates()) == 2
    assert everything(job) == plain


def test_layers_that_a_probe_lets_train_are_named_with_what_to_give() -> None:
    job = type("NotGiven", (Unfreezing,), {"given": False})()
    says = r"body.weight \(a frozen weight\).* by a probe .*add_param_group.* give .* as stateful={'layers': module}"
    with script(PLAN), pytest.raises(RuntimeError, match=says) as raised:
        tuner_of(job).run()
    assert not hasattr(raised.value, "__notes__")  # it stands alone


class Countdown:
    """What the sentence about generators says: a class whose attributes tell how far it is."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> int:
        self.at += 1
        return self.at


@pytest.mark.parametrize("works", [False, True])
def test_a_generator_is_named_and_a_class_in_its_place_works(works: bool) -> None:
    def made() -> Any:
        job: Any = Kind()
        job.numbers = Countdown() if works else (i for i in range(1, 100))
        job.step = lambda index: Kind.step(job, index) * next(job.numbers)
        return job

    torch.manual_seed(0)
    job = made()
    with script(PLAN):
        if works:
            tuner_of(job).run()
            assert job.numbers.at == 7
        else:
            with pytest.raises(
                RuntimeError, match=r"numbers \(a generator\): .*write it as a class with __next__"
            ):
                tuner_of(job).run()


@pytest.mark.parametrize(
    ("skipped", "says"),
    [
        (1, ""),
        (2, ""),
        (99, "first 12 steps, .*; 12 of their losses are not finite, and a step may skip those"),
    ],
)
def test_a_step_that_skips_what_is_not_finite_is_not_said_to_train_nothing(
    skipped: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[int] = []

    def step(batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = model(batch).square().sum()
        loss.backward()
        if len(calls) <= skipped:
            return loss * float("nan")
        optimizer.step()
        return loss

    plan = [Train(0, (0.1,)), Train(1, (0.1,)), Train(2, (0.1,) * 10)]
    with script(plan), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        AutoLRS(
            model, optimizer, max_steps=12, lr_range=(0.1, 1.0), train_step=step, train_data=[torch.ones(2)],
            progress=False,
        ).run()  # fmt: skip
    told = [r.getMessage() for r in caplog.records if "has changed no weight" in r.getMessage()]
    assert len(told) == bool(says)
    assert not says or re.search(says, told[0])


def test_a_setting_that_validate_leaves_is_named_with_what_to_do() -> None:
    says = (
        r"torch.is_grad_enabled\(\): was changed by an evaluation .* Set it back in validate, or use a with"
    )
    with pytest.raises(RuntimeError, match=says):
        check_same(
            {"torch.is_grad_enabled()": "True"}, {"torch.is_grad_enabled()": "False"}, by="an evaluation"
        )


@pytest.mark.parametrize(
    ("made", "take_in"),
    [
        (hashlib.sha256, lambda h: h.update(b"one more")),
        (hashlib.blake2b, lambda h: h.update(b"one more")),
        (hashlib.shake_128, lambda h: h.update(b"one more")),
        (lambda: hmac.new(b"key", digestmod="sha256"), lambda h: h.update(b"one more")),
        *((made, lambda c: c.compress(b"one more")) for made in COMPRESSORS),
        *((made, fed(stream)) for made, stream in DECOMPRESSORS.items()),
    ],
    ids=["sha256", "blake2b", "shake", "hmac", "zlib", "bz2", "lzma", "unzlib", "unbz2", "unlzma"],
)
def test_what_takes_in_and_cannot_be_set_back_is_named(
    made: Callable[[], Any], take_in: Callable[[Any], Any]
) -> None:
    job: Any = Kind()
    job.taken_in = made()
    with script(PLAN):
        tuner_of(job).run()  # it is there, and stays what it is
    job.after = lambda loss, index: take_in(job.taken_in)
    with script(PLAN), pytest.raises(RuntimeError, match=r"taken_in \(an? \w+\): was changed by a probe"):
        tuner_of(job).run()


@pytest.mark.parametrize(
    ("change", "back", "named"),
    [
        (lambda: torch.set_num_threads(3), lambda: torch.set_num_threads(1), "torch.get_num_threads"),
        (
            lambda: torch.autograd.set_detect_anomaly(True),
            lambda: torch.autograd.set_detect_anomaly(False),
            "torch.is_anomaly_enabled",
        ),
        (
            lambda: setattr(decimal.getcontext(), "prec", 5),
            lambda: setattr(decimal.getcontext(), "prec", 28),
            "decimal.getcontext",
        ),
        (lambda: np.seterr(over="raise"), lambda: np.seterr(over="warn"), "numpy.geterr"),
        (lambda: os.chdir("/"), lambda: os.chdir(HERE), "os.getcwd"),
    ],
    ids=["threads", "anomaly", "decimal", "numpy", "folder"],
)
def test_a_setting_of_the_process_that_a_step_changes_is_named(
    change: Callable[[], Any], back: Callable[[], Any], named: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    job: Any = Kind()
    job.after = lambda loss, index: change()
    plan = PLAN[1:]
    try:
        with (
            script(plan),
            pytest.raises(
                RuntimeError, match=rf"{named}\(\): was changed by a probe .* Set it back in train_step"
            ),
        ):
            tuner_of(job).run()
    finally:
        back()
        torch.set_num_threads(threads)


def test_a_file_that_is_written_to_at_its_end_is_a_log_and_one_that_is_read_is_not(tmp_path: Path) -> None:
    for mode in ("w+", "wb+"):
        with (tmp_path / "file").open(mode) as file:
            lines: Any = ["1\n", "2\n"] if mode == "w+" else [b"1\n", b"2\n"]
            before = position(file)
            file.writelines(lines)
            assert position(file) == before
            file.seek(0)
            begun = position(file)
            file.readline()
            assert position(file) not in (begun, before)
            file.readline()
            assert position(file) != begun


def test_where_an_iterator_of_numpy_is_can_be_told_without_an_index() -> None:
    numbers = np.nditer(np.arange(9))
    before = position(numbers)
    assert position(numbers) == before
    next(numbers)  # the first draw leaves the index at 0
    next(numbers)
    assert position(numbers) != before
