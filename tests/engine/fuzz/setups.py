"""What a life in the fuzz is lived with: a policy of ours, and a combination of vLLM's features."""

import copy
import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.config import BASELINES
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.testing.modelled import adapted, tiny_engine_config

MAX_MODEL_LEN = 256
IMAGE_TOKENS = 40
"""The most tokens of an image; below the smallest step that vLLM itself would take."""


CLASSES: dict[str, Any] = {
    "default": "relegated",
    "classes": {
        "refused": {"ttft_slo_ms": 200, "tbt_slo_ms": 50, "when_late": "refuse"},
        "relegated": {"ttft_slo_ms": 400, "tbt_slo_ms": 100, "when_late": "relegate"},
        "served": {"ttft_slo_ms": 200},
        "plain": {},
        "batch": {"batch": True, "max_wait_s": 5},
    },
}


def _policies() -> dict[str, SarathiConfig]:
    settings: dict[str, dict[str, Any]] = {
        "auto": {},
        "slo": {"tbt_slo_ms": 50.0},
        "unattainable": {"tbt_slo_ms": 0.1},
        "pace": {"tbt_slo_ms": 50.0, "tbt_mode": "pace"},
        "sjf": {"tbt_slo_ms": 50.0, "prefill_order": "sjf"},
        "deadline": {"tbt_slo_ms": 50.0, "prefill_order": "deadline", "ttft_slo_ms": 200.0},
        "deadline-auto": {"prefill_order": "deadline", "prefill_max_wait_s": 1.0},
        "deadline-late": {"tbt_slo_ms": 30.0, "prefill_order": "deadline", "ttft_slo_ms": 5.0},
        "own-slo": {"tbt_slo_ms": 50.0, "prefill_order": "deadline", "allow_request_slo": True},
        "fixed": {"token_budget": 24},
        "fixed-sjf": {"token_budget": 24, "prefill_order": "sjf"},
        "chunked-only@24": {"scheduler": "chunked-only", "token_budget": 24},
        "prefill-first@24": {"scheduler": "prefill-first", "token_budget": 24},
        **{name: {"scheduler": name} for name in BASELINES},
        "classes": {"slo_classes": CLASSES},
    }
    return {
        name: SarathiConfig.from_mapping({"calibration_dir": "none", **chosen})
        for name, chosen in settings.items()
    }


POLICIES = _policies()
STOCK = "stock"


@dataclass(frozen=True)
class Setup:
    """A policy, and the features that are on.

    Attributes:
        policy: a name from POLICIES, or STOCK.
        mode: `sync`, `async` or `pipeline`.
        in_flight: batches in flight.
        slots: requests that may run at once.
        limit: the engine's own tokens per step.
        block_size: tokens in a KV block.
        blocks: KV blocks.
        caching: prefix caching.
        adapters: `max_loras`; 0 without adapters.
        priorities: `--scheduling-policy priority`.
        drafts: speculative tokens; 0 without speculation.
        groups: KV-cache groups: `full`, `sliding` or `hybrid`.
        connector: a KV connector's `kv_load_failure_policy`; empty without one.
        images: `chunked`, `whole` (never cut), or empty without them.
        streams: requests whose prompt comes in parts.
        threshold: `long_prefill_token_threshold`.
    """

    policy: str
    mode: str = "sync"
    in_flight: int = 1
    slots: int = 4
    limit: int = 128
    block_size: int = 16
    blocks: int = 64
    caching: bool = False
    adapters: int = 0
    priorities: bool = False
    drafts: int = 0
    groups: str = "full"
    connector: str = ""
    images: str = ""
    streams: bool = False
    threshold: int = 0

    @property
    def stock(self) -> "Setup":
        """The same with vLLM's own scheduler."""
        return replace(self, policy=STOCK)


def _keeps_the_queue(config: SarathiConfig) -> bool:
    return config.prefill_order == "fcfs" and config.slo_classes is None


def random_setup(rng: random.Random, policy: str | None = None) -> Setup:
    """Return a combination of features that vLLM takes, with a policy: the one that is named, or any."""
    names = [*POLICIES] if policy is None else [policy]
    mode = rng.choice(("sync", "sync", "async", "pipeline"))
    groups = rng.choice(("full", "full", "sliding", "hybrid"))
    block_size = 32 if groups == "hybrid" else rng.choice((8, 16, 32))
    # Beside `priority` vLLM's queue has an order already: an order of ours is refused.
    plain = [name for name in names if name == STOCK or _keeps_the_queue(POLICIES[name])]
    priorities = bool(plain) and rng.random() < 0.3
    connector = rng.choice(("", "", "recompute", "fail")) if groups != "hybrid" else ""
    # Chunks of a hybrid model end on blocks, inside of images, too.
    images = rng.choice(("", "", "chunked", "whole" if groups != "hybrid" else "chunked"))
    roomy = rng.random() < 0.5
    # One request of the longest kind must fit, or stock vLLM never ends it.
    least = (MAX_MODEL_LEN // block_size + 2) * (1 if groups == "full" else 2) + 4
    return Setup(
        policy=rng.choice(plain if priorities else names),
        mode=mode,
        in_flight=1 if mode == "sync" else 2,
        slots=rng.choice((1, 2, 4, 8)),
        limit=rng.choice((64, 128, 256)),
        block_size=block_size,
        blocks=400 if roomy else least + rng.randrange(0, least),
        caching=groups == "hybrid" or rng.random() < 0.6,
        adapters=rng.choice((0, 0, 1, 2, 3)),
        priorities=priorities,
        drafts=rng.choice((0, 0, 0, 3)) if groups != "hybrid" and mode != "pipeline" else 0,
        groups=groups,
        connector=connector,
        images=images,
        streams=not connector and rng.random() < 0.25,
        threshold=rng.choice((0, 0, 0, 20))
        if images != "whole"
        else 0,  # else vLLM cuts by it, as it is told to
    )


@functools.cache
def _folder() -> Path:
    return config_folder(Path(tempfile.mkdtemp(prefix="sarathi-fuzz-")))


@functools.lru_cache(maxsize=256)
def _base_config(engine_args: tuple[tuple[str, Any], ...]) -> Any:
    return tiny_engine_config(_folder(), **dict(engine_args))


def vllm_config(setup: Setup) -> Any:
    """Return the VllmConfig of a setup."""
    args: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": setup.slots,
        "max_num_batched_tokens": setup.limit,
        "block_size": setup.block_size,
        "enable_prefix_caching": setup.caching,
        "long_prefill_token_threshold": setup.threshold,
        "scheduling_policy": "priority" if setup.priorities else "fcfs",
    }
    if setup.adapters:
        args |= {"enable_lora": True, "max_loras": setup.adapters, "max_lora_rank": 8}
    config = _base_config(tuple(sorted(args.items())))
    config = adapted(config, POLICIES.get(setup.policy), setup.mode)
    config.scheduler_config.disable_chunked_mm_input = setup.images == "whole"
    if setup.drafts:
        config.speculative_config = _speculation(setup.drafts)
    if setup.connector:
        config.kv_transfer_config = _transfer(setup.connector)
    if setup.groups == "hybrid":
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.mamba_cache_mode = "align"
    return config


@functools.cache
def _speculation(drafts: int) -> Any:
    method = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 3}
    return tiny_engine_config(_folder(), speculative_config=method).speculative_config


@functools.cache
def _transfer(failure_policy: str) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="LateConnector",
        kv_connector_module_path="tests.engine.fuzz.connector",
        kv_role="kv_both",
        kv_load_failure_policy=failure_policy,
    )


def kv_cache_config(setup: Setup) -> KVCacheConfig:
    """Return the KV cache of a setup."""
    common = {"block_size": setup.block_size, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = FullAttentionSpec(**common)
    groups = [KVCacheGroupSpec(["full"], full)]
    if setup.groups == "sliding":
        groups.append(KVCacheGroupSpec(["sliding"], SlidingWindowSpec(sliding_window=64, **common)))
    if setup.groups == "hybrid":
        state = MambaSpec(
            block_size=setup.block_size,
            shapes=((8, 8),),
            dtypes=(torch.float32,),
            page_size_padded=full.page_size_bytes,
            mamba_cache_mode="align",
        )
        groups.append(KVCacheGroupSpec(["state"], state))
    return KVCacheConfig(setup.blocks, [], groups)


def scheduler_class(setup: Setup) -> Callable[..., Any]:
    """Return what `build_scheduler` calls: the configured class, with the KV cache of the setup."""

    def build(vllm_config: Any, **arguments: Any) -> Any:
        cache = kv_cache_config(setup)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, vllm_config)
        scheduler = vllm_config.scheduler_config.get_scheduler_cls()(
            vllm_config=vllm_config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(vllm_config),
            include_finished_set=False,
            log_stats=False,
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        if setup.images:
            scheduler.max_num_encoder_input_tokens = 2 * IMAGE_TOKENS
            scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=3 * IMAGE_TOKENS)
        return scheduler

    return build


def hasher(setup: Setup, config: Any) -> Any:
    """Return what hashes a request's blocks, or None where nothing needs it."""
    if not (setup.caching or setup.connector):
        return None
    from vllm.utils.hashing import get_hash_fn_by_name

    hash_block = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_block)
    _, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config(setup), config)
    return get_request_block_hasher(hash_block_size, hash_block)
