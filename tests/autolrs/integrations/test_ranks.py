"""Every adapter on two real processes, launched by torchrun on loopback: DDP on gloo, and FSDP2 under Accelerate."""

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


@pytest.fixture(scope="module", params=["transformers", "accelerate", "accelerate-fsdp2", "lightning"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, request.param, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_run_with_probes_is_the_run_without_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["tuned"]["schedule"] == list(task.RATES)
        assert found["tuned"]["search_steps"] == 15
        for key in ("bits", "rates", "steps", "trained_on"):
            assert found["tuned"][key] == found["without"][key], key


def test_a_run_that_was_stopped_ends_on_the_same_bits_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        if "resumed" in found:
            assert found["resumed"]["schedule"] == list(task.RATES)
            assert found["resumed"]["bits"] == found["tuned"]["bits"]


def test_all_ranks_find_the_same(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["searched"] for found in ranks)
    assert len(first["schedule"]) == 160
    assert first["search_steps"] > 0
    for key in ("schedule", "search_steps", "rates"):
        assert first[key] == second[key]
