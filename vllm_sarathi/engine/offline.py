"""The real vLLM scheduler and KV-cache manager without a model: for simulations, benchmarks and tests.

The model's shape comes from a folder with nothing but a config.json; no weights, no tokenizer, no device.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import CONFIG_KEY, NO_CALIBRATION, ConfigCarrier, config_from_additional
from vllm_sarathi.engine.vllm.internals import (
    engine_args_class,
    full_attention_spec_class,
    grammar_manager_class,
    kv_cache_config_class,
    kv_cache_group_class,
    model_output_class,
    request_block_hasher,
    request_class,
    sampling_params_class,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""A tiny Llama, as its config.json says it."""


def config_folder(folder: Path, **changes: Any) -> Path:
    """Write a folder that holds nothing but the config.json of LLAMA with `changes`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def engine_config(folder: Path, **engine_args: Any) -> Any:
    """Return vLLM's configuration for a folder made by `config_folder`; `engine_args` are those of EngineArgs."""
    args = {"skip_tokenizer_init": True, "load_format": "dummy", "dtype": "float32", "seed": 0, **engine_args}
    return engine_args_class()(model=str(folder), **args).create_engine_config()


def _kv_cache_config(num_blocks: int, block_size: int) -> Any:
    # Imported here: vLLM brings it, and it takes seconds.
    import torch

    spec = full_attention_spec_class()(
        block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    group = kv_cache_group_class()(["layer"], spec)
    return kv_cache_config_class()(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group])


def build_scheduler(
    config: Any,
    num_blocks: int,
    scheduler_cls: type[Any] | None = None,
    kv_cache_config: Any | None = None,
    log_stats: bool = False,
) -> Any:
    """Return a scheduler as vLLM's engine core builds it.

    Args:
        config: vLLM's configuration; it is not changed and can serve many schedulers.
        num_blocks: KV-cache blocks.
        scheduler_cls: the class; by default the one that the configuration names.
        kv_cache_config: vLLM's description of the KV cache; by default that of a model with full attention alone.
        log_stats: whether it gathers statistics, and ours tells of its steps, as a server's does.
    """
    config = copy.copy(config)
    # A simulation neither uses what real devices have taught nor leaves anything for them.
    ours = replace(config_from_additional(config.additional_config), calibration_dir=NO_CALIBRATION)
    config.additional_config = {**(config.additional_config or {}), CONFIG_KEY: ConfigCarrier(ours)}
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks = num_blocks
    block_size = config.cache_config.block_size
    grammars = grammar_manager_class()(config)
    return (scheduler_cls or config.scheduler_config.get_scheduler_cls())(
        vllm_config=config,
        kv_cache_config=kv_cache_config or _kv_cache_config(num_blocks, block_size),
        structured_output_manager=grammars,
        include_finished_set=False,
        log_stats=log_stats,
        block_size=block_size,
        hash_block_size=block_size,
    )


def block_hasher(config: Any) -> Any:
    """Return what hashes a request's blocks for prefix caching, or None where that is off."""
    if not config.cache_config.enable_prefix_caching:
        return None
    return request_block_hasher(config)


def build_request(
    name: str,
    prompt_tokens: Sequence[int],
    max_tokens: int,
    arrival_s: float,
    *,
    sampling: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Any:
    """Return a request as the engine core makes it; `sampling` goes to SamplingParams, `fields` to Request."""
    params = sampling_params_class()
    return request_class()(
        request_id=name,
        prompt_token_ids=list(prompt_tokens),
        sampling_params=params(max_tokens=max_tokens, ignore_eos=True, **(sampling or {})),
        pooling_params=None,
        arrival_time=arrival_s,
        **fields,
    )


def build_output(sampled: Mapping[str, Sequence[int]]) -> Any:
    """Return a model's output: for each scheduled request the tokens that it sampled, none while it prefills."""
    return model_output_class()(
        req_ids=list(sampled),
        req_id_to_index={name: i for i, name in enumerate(sampled)},
        sampled_token_ids=[list(tokens) for tokens in sampled.values()],
    )
