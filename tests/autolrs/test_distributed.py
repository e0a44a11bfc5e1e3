"""AutoLRS on two real processes, launched by torchrun on loopback: DDP and FSDP2 on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.journal import JournalError
from autolrs_plugin.training.distributed import RankError
from tests.autolrs.ranks_job import SEARCH, RanksJob
from tests.autolrs.scripted import RATES

ROOT = Path(__file__).parents[2]
LAUNCH = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.autolrs.ranks_job"),
)

pytestmark = pytest.mark.slow


KINDS = ("ddp", "fsdp")


def launch(scenes: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, *scenes, str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False
    )


class Scenes:
    """What both ranks found in each scene.

    Attributes:
        folder: where the run was killed, and has gone on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        killed = launch(["fsdp:killed"], folder)
        assert killed.returncode != 0
        assert not (folder / "rank-0.json").exists()
        scenes = [f"{kind}:{scene}" for kind in KINDS for scene in ("search", "scripted", "asked")]
        done = launch([*scenes, "ddp:alone", "fsdp:killed"], folder)
        assert done.returncode == 0, done.stderr
        self._found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]

    def __call__(self, kind: str, scene: str) -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = self._found
        return first[f"{kind}:{scene}"], second[f"{kind}:{scene}"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return Scenes(tmp_path_factory.mktemp("ranks"))


TOLD = ("lrs", "losses", "val_losses", "stages", "search_steps")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scene", ["search", "scripted"])
def test_all_ranks_are_told_the_same_and_train_what_a_plain_loop_trains(
    scenes: Scenes, kind: str, scene: str
) -> None:
    """With every probe undone: bitwise the weights, buffers and optimizer state of DDP's or FSDP's own loop."""
    ranks = scenes(kind, scene)
    assert ranks[0]["search_steps"] > 0
    assert [ranks[0][key] for key in TOLD] == [ranks[1][key] for key in TOLD]
    for rank in ranks:
        assert rank["digests"] == rank["plain_digests"]
    if kind == "ddp":
        assert ranks[0]["digests"]["weights"] == ranks[1]["digests"]["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_drives_it_on_every_rank(scenes: Scenes, kind: str) -> None:
    for rank in scenes(kind, "scripted"):
        assert rank["lrs"] == list(RATES)
        assert rank["driven_digests"] == rank["plain_digests"]
        assert rank["driven_val_losses"] == [[5, 0.5], [7, 0.5]]  # 0 on one rank and 1 on the other


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_rank_is_left_a_search_for_on_all(scenes: Scenes, kind: str) -> None:
    ranks = scenes(kind, "asked")
    assert [rank["stop"] for rank in ranks] == [False, True]
    assert ranks[1]["seen"] == [ranks[1]["real"]]
    for rank, whole in zip(ranks, scenes(kind, "scripted"), strict=True):
        assert rank["search_steps"] == whole["search_steps"] - 1  # the first probe was left a step early
        assert rank["digests"] == whole["plain_digests"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_evaluation_gathers_is_not_trained_on(scenes: Scenes, kind: str) -> None:
    for rank in scenes(kind, "scripted"):
        assert rank["direct_digests"] == rank["plain_digests"]


def test_fsdp_keeps_its_shards(scenes: Scenes) -> None:
    """Each rank holds half of every parameter, and the two halves differ."""
    first, second = scenes("fsdp", "search")
    whole = scenes("ddp", "search")[0]["sizes"]
    assert [2 * size for size in first["sizes"]] == whole
    assert first["sizes"] == second["sizes"]
    assert first["digests"]["weights"] != second["digests"]["weights"]


def test_probes_see_each_ranks_own_batches(scenes: Scenes) -> None:
    first, second = scenes("ddp", "search")
    assert len(first["probe_batches"]) > 5
    assert not set(first["probe_batches"]) & set(second["probe_batches"])
    assert first["probe_batches"] != first["batches"]


def test_two_ranks_find_what_one_process_with_their_batches_finds(scenes: Scenes) -> None:
    """Its batch is both ranks' halves; what differs is the rounding of a mean of means."""
    together = scenes("ddp", "alone")[0]
    job = RanksJob("none", 0, 1, plain_net=True)
    tuner = job.tuner(**SEARCH)
    tuner.run()
    assert together["losses"][:20] == pytest.approx(tuner.losses[:20], rel=1e-3)
    assert together["lrs"] == pytest.approx(tuner.schedule.lrs, rel=0.01)
    assert together["search_steps"] == tuner.ledger.search.steps > 0


def test_a_rank_is_killed_and_the_run_goes_on(scenes: Scenes) -> None:
    """With FSDP2; with DDP it is done at random moments, see `killing_ranks`."""
    for resumed, whole in zip(scenes("fsdp", "killed"), scenes("fsdp", "search"), strict=True):
        assert 0 < resumed["resumed_at"] < len(resumed["lrs"])
        assert resumed["digests"] == whole["digests"]
        assert [resumed[key] for key in TOLD] == [whole[key] for key in TOLD]
        # A part for each rank of the current state and of the kept one, and nothing else.
        assert len(resumed["states"]) == 4
        assert sum("rank-1" in name for name in resumed["states"]) == 2
    alone = RanksJob("none", 0, 1)
    with pytest.raises(JournalError, match="is of another run"):
        alone.tuner(run_dir=scenes.folder / "run", **SEARCH)


def test_a_step_that_fails_on_one_rank_ends_all_with_the_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.autolrs.failing_ranks", str(tmp_path)],
        stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    reason = "rank 1 has failed alone (ValueError: out of memory.)"
    # The third says that the weights are those of the real step.
    assert found["one"] == [
        ["RankError", f"{reason}, so that all processes end.", True],
        ["RankError", f"{reason}, and the others wait for it; start all processes again.", True],
    ]
    # Where all fail, each may try again, as a framework does with a smaller batch.
    assert found["both"] == [["ValueError", "out of memory.", True]] * 2
    assert should_reduce_batch_size(RuntimeError("CUDA out of memory."))
    assert not should_reduce_batch_size(RankError("CUDA out of memory."))


def test_deepspeed_and_fsdp1_are_refused() -> None:
    model = nn.Linear(2, 2)
    kinds = {
        type(
            "DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"}
        ): "a DeepSpeedEngine .* out of",
        type("FullyShardedDataParallel", (nn.Module,), {}): r"FSDP1.*use FSDP2",
    }
    for kind, sentence in kinds.items():
        engine = kind()
        engine.module = model
        with pytest.raises(ValueError, match=f"model: .*{sentence}"):
            AutoLRS(
                engine,
                torch.optim.SGD(model.parameters(), lr=0.1),
                max_steps=9,
                lr_range=(1e-3, 1),
                train_step=lambda: 0.0,
            )
