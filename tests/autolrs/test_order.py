"""Batches whose order depends on what steps change: taken back or resumed, a run draws those of the run without."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler

from tests.autolrs.scripted import PROBING, script
from tests.autolrs.test_inventory import Kind, everything, plainly, tuner_of
from tests.autolrs.test_resume import advanced

INDICES: Any = torch.arange(64)


class Weighted(Kind):
    """The weights of a sampler are the losses of late: given to the loader, and changed in place by the step."""

    workers = 0
    weights: torch.Tensor

    def prepare(self) -> None:
        self.sampler = WeightedRandomSampler(torch.ones(64), 64)
        self.data = DataLoader(INDICES, 16, sampler=self.sampler, num_workers=self.workers)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.sampler.weights[index] *= 3 * float(loss)

    def seen(self) -> Any:
        return self.sampler.weights if hasattr(self, "sampler") else self.weights


class WeightedWithWorkers(Weighted):
    """As above; workers are given indices before their batches are asked for."""

    workers = 1


class Ranked(Kind):
    """A sampler puts what the model finds hard first, when an epoch begins."""

    def prepare(self) -> None:
        model, x = self.model, self.x

        class Hardest(Sampler[int]):
            def __iter__(self) -> Iterator[int]:
                yield from model(x).amax(1).argsort().tolist()

            def __len__(self) -> int:
                return len(x)

        self.data = DataLoader(INDICES, 16, sampler=Hardest())


class DrawnByAFunction(Kind):
    """A function draws an epoch's batches by the weights that the step changes."""

    def prepare(self) -> None:
        self.weights = weights = torch.ones(64)

        def epoch() -> Iterator[torch.Tensor]:
            return iter(torch.multinomial(weights, 64, True).split(16))

        self.data = epoch

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.weights[index] *= 3 * float(loss)


class Toggled(Kind):
    """What an epoch looks at when it begins is then set to what it was in the beginning."""

    def prepare(self) -> None:
        self.order = order = [False]
        self.steps = 0

        def epoch() -> Iterator[torch.Tensor]:
            return iter(INDICES.flip(0).split(16) if order[0] else INDICES.split(16))

        self.data = epoch

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.steps += 1
        self.order[0] = self.steps == 4  # the epoch from step 4 on is the other way round


class Curriculum(Kind):
    """What a data set gives for an index depends on how far training is."""

    def prepare(self) -> None:
        class Shifted(Dataset[int]):
            level = 0

            def __getitem__(self, index: int) -> int:
                return (index + self.level) % 64

            def __len__(self) -> int:
                return 64

        self.set: Any = Shifted()
        self.data = DataLoader(self.set, 16, shuffle=True)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.set.level += 1


class PickedOneByOne(Weighted):
    """A sampler looks at the weights for each index."""

    def prepare(self) -> None:
        self.weights = weights = torch.ones(64)

        class Picking(Sampler[int]):
            def __iter__(self) -> Iterator[int]:
                for _ in range(64):
                    yield int(torch.multinomial(weights, 1))

            def __len__(self) -> int:
                return 64

        self.data = DataLoader(INDICES, 16, sampler=Picking())

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.weights[index] = 1e-9


class AskedOfTheModel(Kind):
    """A function gives batches that the model as it is decides on, one by one."""

    def prepare(self) -> None:
        def epoch() -> Iterator[torch.Tensor]:
            for _ in range(4):
                yield self.model(self.x).amax(1).argsort()[:16]

        self.data = epoch


RIGHT = (Weighted, WeightedWithWorkers, Ranked, DrawnByAFunction, Toggled, Curriculum)
ONE_BY_ONE = (PickedOneByOne, AskedOfTheModel)
"""Each batch is decided on alone, by what there is then: what has been drawn of the epoch has nothing to do with it."""


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_steps_that_were_taken_back_are_taken_again_on_the_same_batches(kind: type[Kind]) -> None:
    torch.manual_seed(0)
    without = plainly(kind())
    torch.manual_seed(0)
    job = kind()
    with script(PROBING):
        tuner_of(job).run()
    assert everything(job) == without


@pytest.mark.parametrize(
    ("kind", "stop"),
    # With workers, which take long to start, amid the second search alone.
    [(kind, stop) for kind in RIGHT for stop in ((9,) if kind is WeightedWithWorkers else (6, 9, 12))],
)
def test_stopped_amid_an_epoch_it_goes_on_with_the_same_batches(
    kind: type[Kind], stop: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    without = plainly(kind())
    torch.manual_seed(0)
    with script(PROBING):
        advanced(tuner_of(kind(), run_dir=tmp_path), stop)
        job = kind()
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == without


@pytest.mark.parametrize("kind", ONE_BY_ONE, ids=lambda kind: kind.__name__)
def test_batches_that_change_amid_an_epoch_are_not_drawn_anew_in_silence(
    kind: type[Kind], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    says = "train_data: begun again, an epoch gave other batches than before among its first"
    torch.manual_seed(0)
    without = plainly(kind())
    torch.manual_seed(0)
    job = kind()
    with script(PROBING):
        tuner_of(job).run()
        assert caplog.text.count(says) == 1
        assert everything(job) == without
        caplog.clear()
        torch.manual_seed(0)
        advanced(tuner_of(kind(), run_dir=tmp_path), 3)
        job = kind()
        tuner_of(job, run_dir=tmp_path).run()
    assert says in caplog.text
    assert everything(job) == without
