"""KV caches of models that have more than full attention, for schedulers without a model."""

from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

BLOCK = 16


def full(block: int = BLOCK) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32)


def sliding(window: int, block: int = BLOCK) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=window
    )


def mamba(block: int = BLOCK) -> MambaSpec:
    return MambaSpec(block_size=block, shapes=((64, 32),), dtypes=(torch.float32,), mamba_cache_mode="align")


def cache_of(num_blocks: int, *specs: Any) -> KVCacheConfig:
    """Return a KV cache with one group of layers for each spec."""
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
