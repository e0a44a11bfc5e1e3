"""Hybrid models, whose chunks end on large blocks (attention beside state-space layers, cache mode "align")."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec

from tests.engine.cases.conftest import MakeEngine, warm_up
from tests.engine.virtual import LinearDevice, TimedStep, VirtualEngine, Work
from vllm_sarathi import SarathiConfig

BLOCK = 528
SLO_MS = 300.0
DEVICE = LinearDevice()


def hybrid_groups(block_size: int = BLOCK) -> list[KVCacheGroupSpec]:
    """Return the KV-cache groups of a model with attention and state-space layers."""
    attention = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
    state = MambaSpec(
        block_size=block_size,
        shapes=((8, 8),),
        dtypes=(torch.float32,),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode="align",
    )
    return [KVCacheGroupSpec(["attention"], attention), KVCacheGroupSpec(["state"], state)]


def align(config: object) -> None:
    config.cache_config.mamba_cache_mode = "align"  # type: ignore[attr-defined]


def read_beside(make_engine: MakeEngine, sarathi: SarathiConfig | None, decodes: int) -> VirtualEngine:
    """Let 3,000 tokens be read beside that number of decodes."""
    engine = make_engine(
        sarathi,
        DEVICE,
        num_blocks=1000,
        kv_groups=hybrid_groups(),
        change=align,
        block_size=BLOCK,
        enable_prefix_caching=True,
        max_num_seqs=256,
    )
    for number in range(decodes):
        engine.add(f"chat{number}", 40, max_tokens=2500)
    engine.run_until_answered(*(f"chat{number}" for number in range(decodes)))
    warm_up(engine)
    engine.add("long", 3000, max_tokens=5)
    engine.run_until_answered("long", most_s=200)
    return engine


@pytest.mark.parametrize("order", ["fcfs", "deadline"])
@pytest.mark.parametrize("decodes", [4, 64, 110])
def test_a_budget_just_below_a_block_does_not_stop_the_reading(
    make_engine: MakeEngine, decodes: int, order: str
) -> None:
    sarathi = SarathiConfig(
        tbt_slo_ms=SLO_MS, prefill_order=order, prefill_max_wait_s=10.0, calibration_dir="none"
    )
    ours, stock = read_beside(make_engine, sarathi, decodes), read_beside(make_engine, None, decodes)
    start_s, slo_s = ours.arrived_s["long"], SLO_MS / 1e3
    block_step_s = DEVICE(Work(BLOCK + decodes, decodes, 300 * decodes, 0.0, BLOCK))
    late = [gap for gap in ours.gaps_s(start_s, "chat0") if gap > 1.05 * slo_s]
    if block_step_s <= slo_s:
        # A block beside the decodes takes a step of its own: it is out after as many steps as it has blocks.
        steps_s = 1.1 * (3000 / BLOCK + 2) * slo_s
        assert ours.ttft_s("long") <= max(1.2 * stock.ttft_s("long"), steps_s)
        assert not late, f"gaps of {late} s"
        assert len(empty_steps(ours)) <= 4
    else:
        # None fits: after the bound on waiting the SLO gives way, a gap for each block.
        assert ours.ttft_s("long") <= sarathi.prefill_max_wait_s + 2 * stock.ttft_s("long")
        assert len(late) <= 3000 / BLOCK + 2, f"gaps of {late} s"


def empty_steps(engine: VirtualEngine) -> list[TimedStep]:
    """Return the steps that read nothing, from when the long prompt came until its answer began."""
    start_s, end_s = engine.arrived_s["long"], engine.token_s["long"][0]
    return [s for s in engine.steps if start_s < s.started_s < end_s and not s.work.prefill_tokens]


@pytest.mark.parametrize("budget", [100, 527, 600])
def test_a_fixed_budget_below_a_block_reads_all_the_same(make_engine: MakeEngine, budget: int) -> None:
    """vLLM cuts a chunk down to whole blocks, and to nothing where there is less than one."""
    engine = read_beside(make_engine, SarathiConfig(token_budget=budget, calibration_dir="none"), 4)
    assert engine.ttft_s("long") <= 10.0
