"""Each key of a config.json: read, refused by its name, or warned of; published models by their published counts."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_house import ROOT
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.config_experts import COUNTS
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.families import FAMILIES
from vllm_sarathi.simulation.models import ModelShape, shape_of_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
LATENT = {"model_type": "deepseek_v3", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LATENT |= {"n_routed_experts": None}


def shape(**changes: Any) -> ModelShape:
    """Return the shape of LLAMA with other keys; one that is `...` is left out."""
    config = {key: value for key, value in {**copy.deepcopy(LLAMA), **changes}.items() if value is not ...}
    return shape_of_config(config, "it")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_takes_what_its_configuration_class_does(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    family = FAMILIES[name]
    if name not in known:
        assert family.tied is None or name in OF_ANOTHER_NAME
        return
    config = known[name]()
    if family.tied is not None:
        assert bool(getattr(config, "tie_word_embeddings", False)) is family.tied
    said = config.to_dict()
    for key, value in family.defaults.items():
        # The pattern of the windows is kept as `layer_types` there.
        if key in said and key != "sliding_window_pattern":
            assert said[key] == value, key
    # A class with experts by default makes a mixture of a file that leaves them out.
    counts = [said[key] for key in COUNTS if (said.get(key) or 0) > 1]
    assert not counts or family.experts
    kinds = said.get("layer_types") or []
    if {"sliding_attention", "full_attention"} <= set(kinds):
        pattern = family.defaults["sliding_window_pattern"]
        pattern = pattern if isinstance(pattern, str) else "L" * (pattern - 1) + "G"
        # The last layer of Gemma 4 looks at all, whatever the pattern.
        assert "".join("LG"[kind == "full_attention"] for kind in kinds[:-1]) == "".join(
            pattern[i % len(pattern)] for i in range(len(kinds) - 1)
        )


OF_ANOTHER_NAME = {"RefinedWeb", "RefinedWebModel", "bailing_moe", "mimo", "minimax_m3", "minimax_m3_text"}
OF_ANOTHER_NAME |= {"nemotron-nas"}
"""Families whose configuration class is not in transformers by that name; the last one's is a Llama's with more."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in ("num_attention_heads", "hidden_size", "vocab_size") for value in (0, -8)],
        *[("num_key_value_heads", value) for value in (0, -8, 5, 64, "8", 8.0, True)],
        *[("max_position_embeddings", value) for value in (0, -3, "8192", 1e9, 2**40)],
        *[("num_hidden_layers", value) for value in (32.0, "32", True, 10**6)],
        *[("intermediate_size", value) for value in (0, -1, [1, 2])],
        *[("head_dim", value) for value in (0, -128)],
        *[("sliding_window", value) for value in (-1, "4096", True)],
        *[("hidden_size", value) for value in (float("inf"), 4100)],
        *[("layer_types", value) for value in ("full_attention", ["mamba"] * 32, 5)],
        ("layers_block_type", 5),
        ("hybrid_override_pattern", 5),
        ("mlp_only_layers", 5),
        ("tie_word_embeddings", "false"),
        ("is_encoder_decoder", True),
        ("text_config", "x"),
        ("model_type", "rwkv"),
        ("model_type", "minimax_m1"),
        ("model_type", 7),
        ("attn_type_list", [1, 0] * 16),
        ("num_kv_shared_layers", 16),
        ("cross_attention_layers", [3, 8]),
        ("altup_num_inputs", 4),
        ("lru_width", 4096),
        ("num_loops", 4),
        ("moe_k", 4),
        ("hidden_size_per_layer_input", 256),
        ("use_cla", True),
        ("activation_function", "sine"),
        ("hidden_act", []),
        ("hidden_act", {"a": 1}),
        ("hidden_act", 3),
        ("torch_dtype", ["bfloat16"] * 200),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_what_is_not_understood_or_nonsense_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        shape(**{key: value})
    assert f"{key!r}" in str(refused.value) or (key == "hidden_size" and value == 4100)
    assert len(str(refused.value)) < 600


def test_experts_beside_the_decoders_keys_are_not_passed_over() -> None:
    with pytest.raises(ConfigError, match="'num_experts' beside the decoder's keys is not understood"):
        shape_of_config({"num_experts": 64, "text_config": LLAMA}, "it")
    seeing = {
        "model_type": "llava",
        "text_config": LLAMA,
        "vision_config": {"hidden_size": 9},
        "image_token_id": 5,
    }
    assert shape_of_config(seeing, "it") == shape()


def test_a_decoder_inside_leaves_out_what_its_class_takes() -> None:
    pytest.importorskip("transformers")
    # As it is published: the other keys are those of the class.
    inside = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    made = shape_of_config({"model_type": "gemma3", "text_config": inside, "vision_config": {}}, "Gemma-3-4B")
    assert made.parameters / 1e9 == pytest.approx(3.88, rel=0.01)
    assert made.kv_bytes_per_token == 34 * 2 * 4 * 256 * 2
    assert made.max_position == 131072
    with pytest.raises(ConfigError, match="has no whole number 'max_position_embeddings'"):
        shape_of_config(inside, "it")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_transformers_writes_is_read(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name not in known or name in INCOMPLETE:
        return
    known[name]().save_pretrained(tmp_path)
    made = shape_of_config(json.loads((tmp_path / "config.json").read_text()), "it")
    assert not made.unread


INCOMPLETE = {
    *("deepseek_v2", "glm4_moe", "granitemoehybrid", "lfm2", "lfm2_moe"),
    "step3p7",  # writes another name of it
}
"""Families whose configuration class has defaults that make no model."""


def test_the_heads_of_gemma_4_are_read_as_transformers_writes_them() -> None:
    layers: dict[str, Any] = {
        "model_type": "gemma4_text",
        "layer_types": (["sliding_attention"] * 7 + ["full_attention"]) * 4,
    }
    layers |= {"attention_k_eq_v": True, "head_dim": 256, "hidden_size_per_layer_input": 0}
    written = {f"{i:02}": {"head_dim": 512, "num_key_value_heads": 4} for i in (7, 15, 23, 31)}
    published = shape(**layers, global_head_dim=512, num_global_key_value_heads=4)
    assert shape(**layers, per_layer_config=written) == published
    assert shape(**layers, per_layer_config={key: {} for key in written}).kv_bytes_per_token == 2 * 32 * 4096
    for wrong in ([1], {**written, "7": {"intermediate_size": 9}}, {"07": {"head_dim": 512}}):
        with pytest.raises(ConfigError, match="'per_layer_config' must say"):
            shape(**layers, per_layer_config=wrong)


def test_keys_of_published_files_that_change_nothing_are_no_error() -> None:
    phi = shape(model_type="phi3", full_attn_mod=1, interpolate_factor=1)
    assert phi == shape(model_type="phi3")
    command = shape(
        model_type="cohere2", layer_switch=4, use_parallel_block=True, use_parallel_embedding=False
    )
    assert command == shape(model_type="cohere2")
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "use_cla": False, "cla_share_factor": 2}
    assert shape(model_type="hunyuan_v1_moe", use_mixed_mlp_moe=True, **experts).unread == ()


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("mixtral", "num_local_experts", {"num_experts_per_tok": 2}),
        ("gpt_oss", "num_local_experts", {"num_experts_per_tok": 4, "experts_per_token": 4}),
        ("qwen3_moe", "num_experts", {"num_experts_per_tok": 8, "moe_intermediate_size": 768}),
        ("qwen3_moe", "moe_intermediate_size", {"num_experts_per_tok": 8, "num_experts": 128}),
        ("glm4_moe", "n_routed_experts", {"num_experts_per_tok": 8, "moe_intermediate_size": 1408}),
        ("gemma4_text", "num_experts", {"enable_moe_block": True, "moe_intermediate_size": 704}),
        ("dbrx", "moe_num_experts", {}),
    ],
)
def test_a_mixture_says_how_many_experts_it_has_and_how_wide(
    name: str, key: str, said: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"has no whole number '{key}'"):
        shape(model_type=name, head_dim=128, **said)


def test_a_mixture_inside_may_leave_out_its_experts() -> None:
    pytest.importorskip("transformers")
    inside = {
        **{key: LLAMA[key] for key in LLAMA if key not in ("intermediate_size", "hidden_act")},
        "model_type": "qwen3_vl_moe_text",
    }
    experts = shape_of_config({"model_type": "qwen3_vl_moe", "text_config": inside}, "it").experts
    assert experts is not None
    assert (experts.count, experts.active, experts.parameters) == (60, 4, 3 * 4096 * 1408)


def test_llama_4_names_its_sparse_layers() -> None:
    experts = {"model_type": "llama4_text", "num_local_experts": 8, "num_experts_per_tok": 1}
    made = shape(**experts, intermediate_size_mlp=4096, moe_layers=[1, 3, 5], interleave_moe_layer_step=1)
    assert sum(kind.count for kind in made.kinds if kind.experts) == 3


def test_qwen2_vl_is_read_as_it_is_published() -> None:
    seeing = shape(model_type="qwen2_5_vl", vision_config={"depth": 32}, vision_start_token_id=9)
    assert seeing == shape(model_type="qwen2")


def test_what_may_matter_is_a_warning(tmp_path: Path) -> None:
    assert shape(foo_bar=3).unread == ("foo_bar",)
    assert shape(rope_theta=1e4, transformers_version="5", pretraining_tp=1, use_cache=True).unread == ()
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **{f"foo_{i}": 1 for i in range(9)}}))
    [warning] = deployment(f"{tmp_path}/h100").source.warnings
    assert "foo_0, foo_1, foo_2, foo_3, foo_4 and 4 more" in warning


@pytest.mark.parametrize(
    ("model_type", "architecture", "contradicts"),
    [
        ("llama", "Qwen3ForCausalLM", True),
        ("mistral", "LlamaForCausalLM", True),
        ("llama", "LlamaForCausalLM", False),
        ("phi3", "Phi3ForSequenceClassification", False),
        ("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration", False),
        ("llama", "OfNoFamilyForCausalLM", False),
    ],
)
def test_architectures_of_another_family_are_a_warning(
    model_type: str, architecture: str, contradicts: bool
) -> None:
    said = shape(model_type=model_type, architectures=[architecture]).unread
    assert said == ((f"architectures ({architecture})",) if contradicts else ())


@pytest.mark.parametrize(
    ("changes", "sliding"),
    [
        ({"sliding_window": 1024}, 32),
        ({"sliding_window": 0}, 0),
        ({"sliding_window": 8192}, 0),  # as long as the longest request
        ({"model_type": "mistral"}, 32),  # 4,096 unless it says otherwise
        ({"model_type": "mistral", "sliding_window": None}, 0),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 1024,
                "use_sliding_window": False,
                "max_window_layers": 28,
            },
            0,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 1024,
                "use_sliding_window": True,
                "max_window_layers": 32,
            },
            0,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 1024,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            32,
        ),
        ({"model_type": "gemma2"}, 16),
        ({"model_type": "gemma3_text"}, 27),
        ({"model_type": "cohere2"}, 24),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, 24),
        ({"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2}, 16),
        ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 0}, 26),
        ({"model_type": "cwm", "max_position_embeddings": 131072}, 24),
        ({"model_type": "mimo_v2_flash", "n_routed_experts": None}, 26),
        ({"layer_types": ["full_attention"] * 30 + ["sliding_attention"] * 2, "sliding_window": 64}, 2),
    ],
)
def test_which_layers_have_a_window(changes: dict[str, Any], sliding: int) -> None:
    made = shape(**changes)
    assert sum(kind.count for kind in made.kinds if kind.attention and kind.attention.window) == sliding


def test_a_window_in_some_layers_of_qwen2_is_refused_as_vllm_does() -> None:
    with pytest.raises(ConfigError, match="'max_window_layers' is 16 of 32 layers"):
        shape(model_type="qwen2", sliding_window=1024, use_sliding_window=True, max_window_layers=16)


def test_a_gate_is_its_familys_whatever_the_activation() -> None:
    gated = shape(model_type="gemma", hidden_act="gelu", head_dim=128)
    plain = shape(model_type="nemotron", hidden_act="silu")
    assert gated.parameters == plain.parameters + 32 * 4096 * 14336
    assert gated.gated
    assert not plain.gated


def test_float32_is_loaded_in_16_bits() -> None:
    assert shape(torch_dtype="float32") == shape(torch_dtype="float16") == shape()


def test_what_a_family_does_not_say_has_to_be_stated() -> None:
    with pytest.raises(ConfigError, match="has no 'tie_word_embeddings'"):
        shape(model_type="internlm2", tie_word_embeddings=...)
    with pytest.raises(ConfigError, match="has no whole number 'num_key_value_heads'"):
        shape(model_type="mistral", num_key_value_heads=...)
    assert shape(num_key_value_heads=...).kv_heads == 32
    assert shape(model_type="cohere", tie_word_embeddings=...).tied
    assert not shape(tie_word_embeddings=...).tied


def test_a_latent_has_no_heads_of_keys() -> None:
    made = shape(**LATENT, kv_lora_rank=512, q_lora_rank=None, num_key_value_heads=5)
    assert made.kv_bytes_per_token == 32 * 2 * (512 + 64)
    with pytest.raises(ConfigError, match="has no whole number 'kv_lora_rank'"):
        shape(**LATENT, q_lora_rank=1536)


def test_the_page_names_all_families() -> None:
    page = (ROOT / "docs/how-to/capacity.md").read_text()
    said = page.partition("`model_type`s are understood:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", said)) == set(FAMILIES)


GPT2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "n_ctx": 1024}


def llama_like(
    layers: int, hidden: int, heads: int, kv: int, width: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": width,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        **more,
    }


PUBLISHED: dict[str, tuple[float, int, dict[str, Any]]] = {
    "GPT-2": (0.124, 36864, {"model_type": "gpt2", "activation_function": "gelu_new", **GPT2}),
    "StarCoder": (
        15.5,
        20480,
        {
            "model_type": "gpt_bigcode",
            "activation_function": "gelu_pytorch_tanh",
            "n_embd": 6144,
            "n_head": 48,
            "n_layer": 40,
            "n_positions": 8192,
            "n_inner": 24576,
            "vocab_size": 49152,
            "multi_query": True,
        },
    ),
    "GPT-J-6B": (
        6.05,
        458752,
        {
            "model_type": "gptj",
            "activation_function": "gelu_new",
            "n_embd": 4096,
            "n_head": 16,
            "n_layer": 28,
            "n_positions": 2048,
            "n_inner": None,
            "rotary_dim": 64,
            "vocab_size": 50400,
        },
    ),
    "OPT-6.7B": (
        6.66,
        524288,
        llama_like(32, 4096, 32, 32, 0, 50272, model_type="opt", intermediate_size=None, ffn_dim=16384)
        | {"word_embed_proj_dim": 4096, "activation_function": "relu"},
    ),
    "BLOOM-7B1": (
        7.07,
        491520,
        {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    ),
    "GPT-NeoX-20B": (
        20.6,
        1081344,
        llama_like(44, 6144, 64, 64, 24576, 50432, model_type="gpt_neox", hidden_act="gelu_fast"),
    ),
    "Falcon-7B": (
        6.92,
        8192,
        {
            "model_type": "falcon",
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": 71,
            "multi_query": True,
            "new_decoder_architecture": False,
            "vocab_size": 65024,
        },
    ),
    "Falcon-40B": (
        41.3,
        122880,
        {
            "model_type": "falcon",
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
            "vocab_size": 65024,
        },
    ),
    "Phi-2": (
        2.78,
        327680,
        llama_like(32, 2560, 32, 32, 10240, 51200, model_type="phi", hidden_act="gelu_new"),
    ),
    "Phi-4": (
        14.66,
        204800,
        llama_like(40, 5120, 40, 10, 17920, 100352, model_type="phi3", sliding_window=None),
    ),
    "Mistral-7B-v0.3": (
        7.25,
        131072,
        llama_like(32, 4096, 32, 8, 14336, 32768, model_type="mistral", sliding_window=None),
    ),
    "Mistral-Nemo": (
        12.25,
        163840,
        llama_like(40, 5120, 32, 8, 14336, 131072, model_type="mistral", head_dim=128, sliding_window=None),
    ),
    "Qwen2.5-7B": (
        7.62,
        57344,
        llama_like(28, 3584, 28, 4, 18944, 152064, model_type="qwen2", sliding_window=131072)
        | {"use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": False},
    ),
    "Gemma-7B": (
        8.54,
        458752,
        llama_like(28, 3072, 16, 16, 24576, 256000, model_type="gemma", hidden_act="gelu", head_dim=256),
    ),
    "Gemma-2-9B": (
        9.24,
        344064,
        llama_like(42, 3584, 16, 8, 14336, 256000, model_type="gemma2", head_dim=256, sliding_window=4096),
    ),
    "Gemma-3-27B": (
        27.0,
        507904,
        llama_like(
            62, 5376, 32, 16, 21504, 262208, model_type="gemma3_text", head_dim=128, sliding_window=1024
        ),
    ),
    "Command-R": (35.0, 1310720, llama_like(40, 8192, 64, 64, 22528, 256000, model_type="cohere")),
    "Command-R7B": (
        8.03,
        131072,
        llama_like(32, 4096, 32, 8, 14336, 256000, model_type="cohere2", sliding_window=4096),
    ),
    "StarCoder2-15B": (
        15.96,
        81920,
        llama_like(40, 6144, 48, 4, 24576, 49152, model_type="starcoder2", hidden_act="gelu_pytorch_tanh"),
    ),
    "Nemotron-4-15B-like Minitron-8B": (
        8.27,
        131072,
        llama_like(32, 4096, 48, 8, 16384, 256000, model_type="nemotron", hidden_act="relu2", head_dim=128),
    ),
    "OLMo-2-13B": (13.7, 819200, llama_like(40, 5120, 40, 40, 13824, 100352, model_type="olmo2")),
    "SmolLM3-3B": (
        3.08,
        73728,
        llama_like(36, 2048, 16, 4, 11008, 128256, model_type="smollm3", no_rope_layers=[1] * 36),
    ),
    "Granite-3.3-8B": (
        8.17,
        163840,
        llama_like(40, 4096, 32, 8, 12800, 49159, model_type="granite", tie_word_embeddings=True),
    ),
    "Seed-OSS-36B": (
        36.15,
        262144,
        llama_like(64, 5120, 80, 8, 27648, 155136, model_type="seed_oss", head_dim=128),
    ),
    "GLM-4-9B-0414": (
        9.4,
        40960,
        llama_like(40, 4096, 32, 2, 13696, 151552, model_type="glm4", head_dim=128),
    ),
    "ChatGLM3-6B": (
        6.24,
        28672,
        {
            "model_type": "chatglm",
            "num_layers": 28,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 128,
            "ffn_hidden_size": 13696,
            "padded_vocab_size": 65024,
            "seq_length": 8192,
            "apply_query_key_layer_scaling": True,
            "attention_softmax_in_fp32": True,
            "tie_word_embeddings": False,
        },
    ),
    "InternLM2-20B": (
        19.86,
        196608,
        llama_like(48, 6144, 48, 8, 16384, 92544, model_type="internlm2", tie_word_embeddings=False),
    ),
    "Baichuan2-7B": (
        7.51,
        524288,
        llama_like(32, 4096, 32, 32, 11008, 125696, model_type="baichuan", tie_word_embeddings=False),
    ),
    "EXAONE-4.0-32B": (
        32.0,
        262144,
        llama_like(
            64,
            5120,
            40,
            8,
            27392,
            102400,
            model_type="exaone4",
            sliding_window=4096,
            sliding_window_pattern="LLLG",
        ),
    ),
    "ERNIE-4.5-0.3B": (
        0.36,
        18432,
        llama_like(18, 1024, 16, 2, 3072, 103424, model_type="ernie4_5", head_dim=128),
    ),
    "Hunyuan-7B": (
        7.5,
        131072,
        llama_like(32, 4096, 32, 8, 14336, 128167, model_type="hunyuan_v1_dense", tie_word_embeddings=True),
    ),
    "Qwen1.5-MoE-A2.7B": (
        14.3,
        196608,
        llama_like(
            24, 2048, 16, 16, 5632, 151936, model_type="qwen2_moe", num_experts=60, num_experts_per_tok=4
        )
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1},
    ),
    "OLMoE-1B-7B": (
        6.92,
        131072,
        llama_like(16, 2048, 16, 16, 1024, 50304, model_type="olmoe", num_experts=64, num_experts_per_tok=8),
    ),
    "Phi-3.5-MoE": (
        41.9,
        131072,
        llama_like(
            32, 4096, 32, 8, 6400, 32064, model_type="phimoe", num_local_experts=16, num_experts_per_tok=2
        ),
    ),
    "DeepSeek-V2-Lite": (
        15.7,
        31104,
        llama_like(
            27,
            2048,
            16,
            16,
            10944,
            102400,
            model_type="deepseek_v2",
            n_routed_experts=64,
            num_experts_per_tok=6,
        )
        | {
            "moe_intermediate_size": 1408,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        }
        | {
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "GLM-4.5-Air": (
        106.9,
        188416,
        llama_like(46, 4096, 96, 8, 10944, 151552, model_type="glm4_moe", head_dim=128, n_routed_experts=128)
        | {
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "dots.llm1": (
        142.8,
        1015808,
        llama_like(
            62, 4096, 32, 32, 10944, 152064, model_type="dots1", n_routed_experts=128, num_experts_per_tok=6
        )
        | {"moe_intermediate_size": 1408, "n_shared_experts": 2, "first_k_dense_replace": 1, "head_dim": 128},
    ),
    "ERNIE-4.5-21B-A3B": (
        21.8,
        57344,
        llama_like(28, 2560, 20, 4, 12288, 103424, model_type="ernie4_5_moe", moe_num_experts=64, moe_k=6)
        | {"moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}
        | {"moe_layer_end_index": -1, "moe_layer_interval": 1, "head_dim": 128},
    ),
    "Hunyuan-A13B": (
        80.4,
        131072,
        llama_like(
            32, 4096, 32, 8, 3072, 128167, model_type="hunyuan_v1_moe", num_experts=64, moe_topk=[8] * 32
        )
        | {"moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32, "tie_word_embeddings": True},
    ),
    "Qwen3-Next-80B-A3B": (
        79.7,
        24576,
        llama_like(48, 2048, 16, 2, 5120, 151936, model_type="qwen3_next", head_dim=256, num_experts=512)
        | {"num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
        | {"full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
        | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
        | {"decoder_sparse_step": 1, "attn_output_gate": True},
    ),
}
"""Billions of weights that the makers state, and bytes of KV cache for a token: two for each number of each key and
value, over all layers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_weights(name: str) -> None:
    billions, token_bytes, config = PUBLISHED[name]
    made = shape_of_config(config, name)
    assert made.parameters / 1e9 == pytest.approx(billions, rel=0.03)
    assert made.kv_bytes_per_token == token_bytes
    assert not made.unread
