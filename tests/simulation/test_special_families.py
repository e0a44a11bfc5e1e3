"""Zamba 2, Gemma 3n and 4, MiniMax-M3 and DeepSeek-V4: weights by their classes in transformers, caches by vLLM's."""

import math
from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.devices.roofline import Roofline, device
from vllm_sarathi.simulation.models import ModelShape, shape_of_config
from vllm_sarathi.simulation.quantization import MXFP4_BYTES

SIZES = {"hidden_size": 512, "vocab_size": 4096, "max_position_embeddings": 65536, "num_attention_heads": 8}

GEMMA = {
    **SIZES,
    "num_hidden_layers": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": [1024] * 10,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    "sliding_window": 256,
    "num_kv_shared_layers": 5,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 4000,
}
INDEX = {"index_n_heads": 4, "index_head_dim": 128}

TINY: dict[str, dict[str, Any]] = {
    "zamba2": {
        **SIZES,
        "num_hidden_layers": 8,
        "layers_block_type": ["mamba", "hybrid"] * 4,
        "n_mamba_heads": 16,
        "mamba_headdim": 64,
        "mamba_ngroups": 2,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "intermediate_size": 2048,
        "num_mem_blocks": 2,
        "adapter_rank": 16,
        "use_shared_attention_adapter": True,
    },
    "gemma3n_text": {
        **GEMMA,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 7,
        "altup_num_inputs": 4,
        "laurel_rank": 16,
    },
    "gemma4_text": {**GEMMA, "intermediate_size": 1024, "use_double_wide_mlp": True},
    "minimax_m3_vl_text": {
        **SIZES,
        **INDEX,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 256,
        "dense_intermediate_size": 1024,
        "shared_intermediate_size": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "index_block_size": 128,
        "index_topk_blocks": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "deepseek_v4": {
        **SIZES,
        **INDEX,
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_lora_rank": 64,
        "o_groups": 4,
        "moe_intermediate_size": 256,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 4, 128, 0],
        "index_topk": 512,
        "sliding_window": 128,
        "hc_mult": 4,
    },
}
"""A small config.json of each."""


def small(name: str, **changes: Any) -> ModelShape:
    return shape_of_config({"model_type": name, **TINY[name], **changes}, "it")


@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_the_model_in_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name not in known:
        pytest.skip("this transformers has no such class")
    with torch.device("meta"):
        if name == "minimax_m3_vl_text":
            model = transformers.MiniMaxM3VLForCausalLM(known[name](**TINY[name]))
        else:
            model = transformers.AutoModelForCausalLM.from_config(known[name](**TINY[name]))
    theirs = sum(weight.numel() for weight in dict.fromkeys(model.parameters()))
    made = small(name)
    # Norms and biases are not counted, and are a larger part of a small model than of one that is served.
    assert made.parameters == pytest.approx(theirs, rel=0.006)
    assert made.unread == ()


def test_layers_that_read_the_cache_of_others_keep_none() -> None:
    # Gemma 4's class has heads of 512 in layers without a window.
    for name, global_head in (("gemma3n_text", 64), ("gemma4_text", 512)):
        made = small(name)
        cache = 2 * 2 * 2 * (4 * 64 * 256 + global_head * 65536)
        assert made.kv_bytes(65536) == cache
        assert small(name, num_kv_shared_layers=0).kv_bytes(65536) == 2 * cache


def test_layers_that_share_weights_have_caches_of_their_own() -> None:
    made, one = small("zamba2"), small("zamba2", num_mem_blocks=1)
    assert made.kv_bytes_per_token == one.kv_bytes_per_token == 4 * 2 * 1024 * 2
    transformer = 2 * 512 * 1024 * 3 + 1024 * 512 + 3 * 512 * 2048
    assert made.parameters - one.parameters == transformer
    assert made.weight_bytes - one.weight_bytes == 2 * transformer
    # Each use of them reads them again.
    assert made.active_parameters == one.active_parameters


def test_the_index_of_minimax_m3_has_a_key_for_each_token_and_the_rest_is_read_in_part() -> None:
    made = small("minimax_m3_vl_text")
    assert made.kv_bytes_per_token == 4 * 2 * 4 * 128 * 2 + 3 * 2 * 128
    # As its makers write it.
    config = {
        k: v for k, v in TINY["minimax_m3_vl_text"].items() if "index" not in k and "layer_types" not in k
    }
    config["sparse_attention_config"] = {
        "sparse_attention_freq": [0, 1, 1, 1],
        "sparse_disable_index_value": [0, 1, 1, 1],
        "sparse_num_index_heads": 4,
        "sparse_index_dim": 128,
        "sparse_block_size": 128,
        "sparse_topk_blocks": 4,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "use_sparse_attention": True,
    }
    config["moe_layer_freq"] = [0, 1, 1, 1]
    assert shape_of_config({"model_type": "minimax_m3", **config}, "it") == made


def test_deepseek_v4_keeps_entries_of_several_tokens() -> None:
    made, entry = small("deepseek_v4"), 448 + 2 * 64 + 8
    windows = 5 * 128 * entry
    growing = 2 * (entry + 132) / 4 + 2 * entry / 128
    waiting = 2 * 8 * (4 * 2 * 2 * (512 + 128)) + 2 * 128 * 4 * 2 * 512
    assert made.kv_bytes(65536) == pytest.approx(windows + growing * 65536 + waiting)
    half = made.kv_in(1.0)
    assert half.kv_bytes(65536) == made.kv_bytes(65536)


def test_experts_of_deepseek_v4_have_a_precision_of_their_own() -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert small("deepseek_v4", **quantized, expert_dtype="fp4").precision.experts == MXFP4_BYTES
    assert small("deepseek_v4", **quantized, expert_dtype="fp8").precision.experts == 1.0
    assert small("deepseek_v4", **quantized).precision.mlp == 1.0
    with pytest.raises(ConfigError, match="'expert_dtype' is 'int3'"):
        small("deepseek_v4", **quantized, expert_dtype="int3")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("deepseek_v4", {"compress_ratios": [0, 4, 128, 4, 7]}, "'compress_ratios' has '7'"),
        ("deepseek_v4", {"compress_ratios": None}, "has no 'compress_ratios'"),
        ("deepseek_v4", {"index_n_heads": None}, "has no whole number 'index_n_heads'"),
        ("deepseek_v4", {"layer_types": ["full_attention"] * 5}, "'layer_types' has 'full_attention'"),
        ("zamba2", {"layers_block_type": None}, "'layers_block_type' must be a list"),
        ("zamba2", {"layers_block_type": ["mamba", "attention"]}, "not 'attention'"),
        (
            "gemma3n_text",
            {"intermediate_size": [1024] * 9 + [512]},
            "'intermediate_size' must be a whole number",
        ),
    ],
)
def test_what_is_not_understood_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(name, **changes)


def test_a_token_reads_no_more_than_it_chooses() -> None:
    unit = device("h200")

    def step_s(context: int, **changes: Any) -> float:
        times = Roofline(small("deepseek_v4", **changes), unit)
        return times.stage_s(StepShape(64, 64, 64 * context, 0.0, 64))

    near, far, further = (step_s(context) for context in (2048, 32768, 65536))
    assert near < far < further
    # Beyond what is chosen, only the index and the entries of 128 tokens grow.
    unchosen = [step_s(context, index_topk=2**20) for context in (2048, 65536)]
    assert unchosen[0] == near
    assert unchosen[1] - near > 3 * (further - near)
    assert math.isfinite(further)
