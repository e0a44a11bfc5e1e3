"""What the cases share: engines of the size of a small server, stock and ours, under a virtual clock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.virtual import Device, VirtualEngine
from vllm_sarathi import SarathiConfig
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.testing.modelled import config_maker

SLO_MS = 150.0
SLO_S = SLO_MS / 1e3

FCFS = SarathiConfig(tbt_slo_ms=SLO_MS, calibration_dir="none")
DEADLINE = SarathiConfig(
    tbt_slo_ms=SLO_MS, prefill_order="deadline", ttft_slo_ms=2000.0, calibration_dir="none"
)
OURS = {"fcfs": FCFS, "deadline": DEADLINE}

MakeEngine = Callable[..., VirtualEngine]


@pytest.fixture(scope="session")
def long_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that describes a tiny Llama of a long context."""
    return config_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1 << 20)


@pytest.fixture(scope="session")
def make_long_config(long_model_folder: Path) -> Callable[..., Any]:
    """As `make_config`, for that model."""
    return config_maker(long_model_folder)


@pytest.fixture
def make_engine(make_long_config: Any) -> MakeEngine:
    """Return a function that gives an engine: stock without a SarathiConfig, ours with one."""

    def make(
        sarathi: SarathiConfig | None = None,
        device: Device | None = None,
        num_blocks: int = 4000,
        kv_groups: Any = None,
        change: Callable[[Any], None] | None = None,
        **engine_args: Any,
    ) -> VirtualEngine:
        defaults = {"max_model_len": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
        config = make_long_config(sarathi, **{**defaults, **engine_args})
        if change is not None:
            change(config)
        return VirtualEngine(config, device, num_blocks, kv_groups)

    return make


def warm_up(engine: VirtualEngine, prompts: int = 20) -> None:
    """Live an ordinary life for a while: prompts come one after the other beside whatever decodes."""
    for number in range(prompts):
        engine.add(f"warm{number}", 100 + (number * 97) % 400, max_tokens=5)
        engine.run(12)
    engine.run_until(lambda: not any(name.startswith("warm") for name in engine.scheduler.requests))
