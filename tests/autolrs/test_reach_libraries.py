"""State that libraries keep for a step: averagers, hooks that exchange gradients, counts of steps and of epochs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from lightning.fabric import Fabric
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, check_as_without_probes, everything, plainly, tuner_of


@pytest.fixture(autouse=True, scope="module")
def a_group_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class CompressedGradients(Kind):
    """PowerSGD: what compression has left out is added to the next gradients. Only DDP holds its state.

    It goes by DDP's buckets, which another process makes in another order until its first step.
    """

    def prepare(self) -> None:
        self.model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        state = PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
        self.model.register_comm_hook(state, powerSGD_hook)

    def seen(self) -> Any:
        _, state = self.model._comm_hooks[0]
        errors = {index: error.tolist() for index, error in state.error_dict.items()}
        return state.iter, errors, state.rng.get_state()[1].tolist()


class AveragedNowAndThen(Kind):
    """An optimizer that averages the weights of all processes every other step."""

    def prepare(self) -> None:
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.optimizer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2, warmup_steps=1))

    def seen(self) -> Any:
        return self.optimizer.averager.step


class LocalSteps(Kind):
    """Accelerate's LocalSGD, which counts steps."""

    def prepare(self) -> None:
        self.local = LocalSGD(Accelerator(cpu=True), self.model, local_sgd_steps=2)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.local.step()

    def seen(self) -> Any:
        return self.local.num_steps


class ALoaderOfFabric(Kind):
    """It counts its epochs, and tells the number to its sampler."""

    class Sampler:
        """Of an order that follows from the epoch."""

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 64

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def prepare(self) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        sampler: Any = self.Sampler()
        loader: Any = DataLoader(torch.arange(64), 16, sampler=sampler)
        self.data = fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def seen(self) -> Any:
        return self.data._num_iter_calls


KINDS = [CompressedGradients, AveragedNowAndThen, LocalSteps, ALoaderOfFabric]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_library_keeps_is_as_without_probes(kind: type[Kind]) -> None:
    check_as_without_probes(kind)


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.__name__)
def test_what_a_library_keeps_is_in_the_folder_of_a_run(kind: type[Kind], tmp_path: Path) -> None:
    torch.manual_seed(0)
    without = plainly(kind())
    torch.manual_seed(0)
    with script(PLAN):
        tuner = tuner_of(kind(), run_dir=tmp_path)
        for _ in range(9):
            tuner.tell(tuner.perform(tuner.next_action()))
        tuner.close()
        torch.manual_seed(0)
        job = kind()
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == without


def test_state_by_buckets_is_warned_of_where_a_run_can_be_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with script(PLAN):
        tuner_of(CompressedGradients())
        tuner_of(AveragedNowAndThen(), run_dir=tmp_path / "counted").close()
        assert "buckets" not in caplog.text
        tuner_of(CompressedGradients(), run_dir=tmp_path / "compressed").close()
    assert "keeps state by DDP's buckets (PowerSGDState)" in caplog.text
