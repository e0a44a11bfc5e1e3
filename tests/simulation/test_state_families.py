"""Families whose layers keep a state, and others with layers of several kinds: by published figures and by code."""

from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.families import FAMILIES
from vllm_sarathi.simulation.models import shape_of_config

MIXED = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
MAMBA2 = {
    "mamba_d_conv": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
}
KIMI = {
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}

TINY: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        **MIXED,
        **MAMBA2,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "mamba_n_heads": 16,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "intermediate_size": 256,
        "shared_intermediate_size": 384,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {
        **MIXED,
        **MAMBA2,
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "mamba_n_heads": 16,
        "mamba_d_ssm": 768,
        "intermediate_size": 1024,
    },
    "jamba": {
        **MIXED,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1024,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    **dict.fromkeys(
        ("mamba", "falcon_mamba"),
        {"hidden_size": 512, "num_hidden_layers": 3, "state_size": 16, "conv_kernel": 4, "expand": 2}
        | {"vocab_size": 4096, "intermediate_size": 1024},
    ),
    "mamba2": {
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "state_size": 64,
        "conv_kernel": 4,
        "expand": 2,
        "num_heads": 16,
        "head_dim": 64,
        "n_groups": 2,
        "vocab_size": 4096,
    },
    "lfm2": {
        **MIXED,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "block_ff_dim": 2000,
        "conv_L_cache": 3,
        "full_attn_idxs": [2],
    },
    "lfm2_moe": {
        **MIXED,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "kimi_linear": {
        **MIXED,
        **KIMI,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "model_max_length": 4096,
        "head_dim": 36,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 64,
            "num_heads": 8,
            "short_conv_kernel_size": 4,
        },
    },
    "dbrx": {
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 2,
        "max_seq_len": 4096,
        "vocab_size": 4096,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 1024, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
    },
}
"""A small config.json of each, as its makers write them."""


@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_the_model_in_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name](**TINY[name], pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = sum(weight.numel() for weight in dict.fromkeys(model.parameters()))
    made = shape_of_config({"model_type": name, **TINY[name]}, "it")
    # Norms and biases are not counted, and are a larger part of a small model than of one that is served.
    assert made.parameters == pytest.approx(theirs, rel=0.006)
    assert made.unread == ()


@pytest.mark.parametrize(
    ("name", "changes", "shapes"),
    [
        ("mamba", {}, [(3 * 1024, 2), (1024 * 16, 2)]),
        ("mamba2", {}, [(3 * (1024 + 2 * 2 * 64), 2), (16 * 64 * 64, 2)]),
        ("granitemoehybrid", {}, [(3 * (1024 + 2 * 2 * 64), 2), (16 * 64 * 64, 2)]),
        ("falcon_h1", {}, [(3 * (768 + 2 * 2 * 64), 2), (16 * 48 * 64, 2)]),
        ("lfm2", {}, [(2 * 512, 2)]),
        ("kimi_linear", {}, [(3 * 3 * 512, 2), (8 * 64 * 64, 4)]),
    ],
)
def test_a_state_has_the_shape_and_type_that_vllm_gives_it(
    name: str, changes: dict[str, Any], shapes: list[tuple[int, int]]
) -> None:
    made = shape_of_config({"model_type": name, **TINY[name], **changes}, "it")
    kept = {kind.state.state_bytes for kind in made.kinds if kind.state}
    assert kept == {sum(elements * size for elements, size in shapes)}


LINEAR = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize(
    ("name", "said", "element"),
    [
        ("qwen3_next", {"num_experts": 0}, 2),
        (
            "qwen3_next",
            {"num_experts": 0, "mamba_ssm_dtype": "float32"},
            2,
        ),  # vLLM heeds it for Qwen3.5 alone
        ("qwen3_5_text", {}, 2),
        ("qwen3_5_text", {"mamba_ssm_dtype": "float32"}, 4),
    ],
)
def test_a_state_has_32_bits_where_the_family_says_so(name: str, said: dict[str, Any], element: int) -> None:
    made = shape_of_config({"model_type": name, **MIXED, **LINEAR, **said}, "it")
    assert made.state_bytes == 3 * (element * 4 * 32 * 64 + 2 * 3 * (2 * 2 * 32 + 4 * 64))


def test_the_state_of_nemotron_h_has_32_bits_unless_it_says_otherwise() -> None:
    config = {
        "model_type": "nemotron_h",
        **MIXED,
        "hidden_size": 512,
        "hybrid_override_pattern": "M*-",
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "intermediate_size": 1024,
    }
    convolution = 2 * 3 * (1024 + 2 * 2 * 64)
    assert shape_of_config(config, "it").state_bytes == 4 * 16 * 64 * 64 + convolution
    half = shape_of_config({**config, "mamba_ssm_cache_dtype": "float16"}, "it")
    assert half.state_bytes == 2 * 16 * 64 * 64 + convolution
    with pytest.raises(ConfigError, match="'mamba_ssm_cache_dtype' is 'int8'; known are float32"):
        shape_of_config({**config, "mamba_ssm_cache_dtype": "int8"}, "it")


def published(layers: int, hidden: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab, **more}


GRANITE = {
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
}
PUBLISHED: dict[str, tuple[float, float, dict[str, Any]]] = {
    "Granite-4.0-H-Small": (
        32.2,
        9,
        published(40, 4096, 100352, model_type="granitemoehybrid", mamba_n_heads=128, **GRANITE)
        | {"layer_types": (["mamba"] * 9 + ["attention"]) * 4, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "intermediate_size": 768, "shared_intermediate_size": 1536}
        | {"num_local_experts": 72, "num_experts_per_tok": 10, "max_position_embeddings": 131072}
        | {"tie_word_embeddings": True, "position_embedding_type": "nope", "attention_multiplier": 0.0078},
    ),
    "Granite-4.0-H-Micro": (
        3.19,
        3.19,
        published(40, 2048, 100352, model_type="granitemoehybrid", mamba_n_heads=64, **GRANITE)
        | {"layer_types": (["mamba"] * 9 + ["attention"]) * 4, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "intermediate_size": 8192, "shared_intermediate_size": 8192}
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "max_position_embeddings": 131072}
        | {"tie_word_embeddings": True},
    ),
    "Falcon-H1-7B": (
        7.59,
        7.59,
        published(44, 3072, 130048, model_type="falcon_h1", num_attention_heads=12, num_key_value_heads=2)
        | {"head_dim": 128, "intermediate_size": 12288, "mamba_d_ssm": 3072, "mamba_d_state": 256}
        | {
            "mamba_d_head": 128,
            "mamba_n_heads": 24,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        }
        | {"mamba_use_mlp": True, "mlp_expansion_factor": 8, "mlp_multipliers": [0.88, 0.22]}
        | {"ssm_multipliers": [0.35] * 5, "max_position_embeddings": 262144, "mamba_chunk_size": 256},
    ),
    "Jamba-1.5-Mini": (
        51.6,
        12,
        published(32, 4096, 65536, model_type="jamba", num_attention_heads=32, num_key_value_heads=8)
        | {"intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2, "mamba_d_state": 16}
        | {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256, "max_position_embeddings": 262144},
    ),
    "Mamba-2.8B": (
        2.77,
        2.77,
        published(64, 2560, 50280, model_type="mamba", intermediate_size=5120, state_size=16, conv_kernel=4)
        | {"d_inner": 5120, "d_model": 2560, "n_layer": 64, "expand": 2, "time_step_rank": 160},
    ),
    "Falcon-Mamba-7B": (
        7.27,
        7.27,
        published(64, 4096, 65024, model_type="falcon_mamba", intermediate_size=8192, state_size=16)
        | {"conv_kernel": 4, "expand": 2, "time_step_rank": 256, "tie_word_embeddings": False},
    ),
    "Mamba-Codestral-7B": (
        7.29,
        7.29,
        published(64, 4096, 32768, model_type="mamba2", num_heads=128, head_dim=64, n_groups=8)
        | {"state_size": 128, "conv_kernel": 4, "expand": 2, "chunk_size": 256, "tie_word_embeddings": False},
    ),
    "LFM2-1.2B": (
        1.17,
        1.17,
        published(16, 2048, 65536, model_type="lfm2", num_attention_heads=32, num_key_value_heads=8)
        | {"block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288, "conv_dim": 2048}
        | {"block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256}
        | {"block_use_swiglu": True, "conv_L_cache": 3, "conv_dim_out": 2048, "conv_use_xavier_init": True}
        | {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "max_position_embeddings": 128000},
    ),
    "LFM2-8B-A1B": (
        8.34,
        1.5,
        published(24, 2048, 65536, model_type="lfm2_moe", num_attention_heads=32, num_key_value_heads=8)
        | {"intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2}
        | {"num_experts": 32, "num_experts_per_tok": 4, "conv_L_cache": 3, "max_position_embeddings": 128000}
        | {"layer_types": (["conv", "conv", "full_attention", "conv"]) * 6},
    ),
    "Kimi-Linear-48B-A3B": (
        49.1,
        3.4,
        published(27, 2304, 163840, model_type="kimi_linear", num_attention_heads=32, num_key_value_heads=32)
        | {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "head_dim": 72, "mla_use_nope": True, "intermediate_size": 9216}
        | {"moe_intermediate_size": 1024, "num_experts": 256, "num_experts_per_token": 8}
        | {"num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_expert_group": 1}
        | {"model_max_length": 1048576, "moe_renormalize": True, "moe_router_activation_func": "sigmoid"}
        | {
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "head_dim": 128,
                "num_heads": 32,
                "kda_layers": [i for i in range(1, 27) if i % 4],
                "short_conv_kernel_size": 4,
            }
        },
    ),
    "DBRX": (
        131.6,
        36,
        {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768}
        | {"vocab_size": 100352, "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000}}
        | {"ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
    ),
}
"""Billions of weights and of weights that a token goes through, as the makers state them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_weights(name: str) -> None:
    billions, active, config = PUBLISHED[name]
    made = shape_of_config(config, name)
    assert made.parameters / 1e9 == pytest.approx(billions, rel=0.03)
    assert made.active_parameters / 1e9 == pytest.approx(active, rel=0.09)
    assert made.unread == ()


def block(heads_in_group: int | None, factor: float | None) -> dict[str, Any]:
    return {
        "attention": {"n_heads_in_group": heads_in_group, "no_op": heads_in_group is None},
        "ffn": {"ffn_mult": factor, "no_op": factor is None},
    }


def searched(*blocks: Any) -> dict[str, Any]:
    return {
        "model_type": "nemotron-nas",
        "hidden_size": 1024,
        "num_hidden_layers": len(blocks),
        **MIXED,
        "num_key_value_heads": None,
        "block_configs": list(blocks),
    }


def test_each_layer_of_a_searched_model_is_its_own() -> None:
    made = shape_of_config(searched(block(4, 2.625), block(None, 1.0), block(8, None)), "it")
    dim, widths = 1024 // 8, (1792, 768)  # rounded up to multiples of 256
    attention = [1024 * dim * (8 + 2 * kv + 8) for kv in (2, 1)]
    assert made.parameters == sum(attention) + 3 * 1024 * sum(widths) + 2 * 4096 * 1024
    assert made.kv_bytes_per_token == 2 * 2 * dim * (2 + 1)
    assert made.intermediate == 1792


@pytest.mark.parametrize(
    ("spoilt", "named"),
    [
        ([block(3, 1.0)], "'n_heads_in_group' 3, of 8 heads"),
        (
            [{"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}}],
            "'attention' is not understood",
        ),
        ([{"attention": {"no_op": True}, "ffn": {}}], "'ffn' without a width"),
        ([7], "a list of an object for each layer"),
    ],
)
def test_a_searched_layer_that_is_not_understood_is_named(spoilt: list[Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        shape_of_config(searched(*spoilt), "it")


def test_a_family_without_states_has_none_in_its_layers() -> None:
    config = {
        "model_type": "qwen3",
        **MIXED,
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    }
    with pytest.raises(ConfigError, match="layers without attention, which are not understood"):
        shape_of_config({**config, "layer_types": ["mamba", "full_attention"]}, "it")


def test_where_attention_is_has_to_be_said() -> None:
    config = {key: value for key, value in TINY["granitemoehybrid"].items() if key != "layer_types"}
    with pytest.raises(ConfigError, match="which of its layers have attention: 'layer_types' would"):
        shape_of_config({"model_type": "granitemoehybrid", **config}, "it")


def test_every_kind_of_state_is_tried() -> None:
    assert {FAMILIES[name].state for name in TINY} | {"gated_delta"} >= {
        family.state for family in FAMILIES.values()
    }
