"""Every adapter on two real processes, launched by torchrun on loopback: DDP and FSDP2 on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.autolrs.integrations import task
from tests.test_house import ROOT

LAUNCH = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
    *("--rdzv-endpoint=127.0.0.1:0", "-m", "tests.autolrs.integrations.ranks_task"),
)

pytestmark = pytest.mark.slow


FRAMEWORKS = [
    f"{name}{kind}" for name in ("transformers", "accelerate", "lightning") for kind in ("", "-fsdp2")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found, by framework: in one pair of processes, for it is the imports that take long."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, *FRAMEWORKS, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(params=FRAMEWORKS)
def ranks(request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What both ranks found in a framework."""
    return [of_rank[request.param] for of_rank in found]


def test_a_run_with_probes_is_the_run_without_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["tuned"]["schedule"] == list(task.RATES)
        assert found["tuned"]["search_steps"] == 15
        for key in ("bits", "rates", "steps", "trained_on"):
            assert found["tuned"][key] == found["without"][key], key


def test_a_run_that_was_stopped_ends_on_the_bits_of_one_without_probes_that_was(
    ranks: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """Lightning's own resumed runs differ from whole ones, in their noise and in rank 1's buffers."""
    keys = ("bits", "trained_on")
    for found in ranks:
        if "resumed" in found:
            assert found["resumed"]["schedule"] == list(task.RATES)
            assert [found["resumed"][k] for k in keys] == [found["resumed_without"][k] for k in keys]
            if "lightning" not in request.node.callspec.params["ranks"]:
                assert [found["resumed"][k] for k in keys] == [found["tuned"][k] for k in keys]


def test_what_is_spread_stays_spread(ranks: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    """With FSDP2 each rank has half of a weight, and of its optimizer's state; with DDP all of both."""
    sharded = "fsdp2" in request.node.callspec.params["ranks"]
    share = 64 * 16 * 4 // (2 if sharded else 1)
    for found in ranks:
        assert found["tuned"]["bytes"] == {"body.weight": share, "state.0.exp_avg": share}


def test_all_ranks_find_the_same(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["searched"] for found in ranks)
    assert len(first["schedule"]) == 160
    assert first["search_steps"] > 0
    for key in ("schedule", "search_steps", "rates"):
        assert first[key] == second[key]
