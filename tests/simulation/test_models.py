"""Models in numbers: published counts of weights, caches worked out by hand, and what is refused.

Which models' published counts may have been looked at while the formulas were written is decided by a hash of the
name: `choosing` for those, `judging` for the others, which only judge.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.layers import Experts
from vllm_sarathi.simulation.models import model_shape, shape_of_config

pytest.importorskip("aiconfigurator_core")

import aiconfigurator_core

CONFIGS = Path(aiconfigurator_core.__file__).parent / "model_configs"

PUBLISHED: dict[str, tuple[float, float]] = {
    "MiniMaxAI/MiniMax-M2.5": (229, 10),
    "Qwen/Qwen3-0.6B": (0.6, 0.6),
    "Qwen/Qwen3-1.7B": (1.7, 1.7),
    "Qwen/Qwen3-8B": (8.2, 8.2),
    "Qwen/Qwen3-32B": (32.8, 32.8),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-235B-A22B": (235, 22),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480, 35),
    "Qwen/Qwen3.5-27B": (27, 27),
    "Qwen/Qwen3.5-35B-A3B": (35, 3),
    "Qwen/Qwen3.5-397B-A17B": (397, 17),
    "XiaomiMiMo/MiMo-V2-Flash": (309, 15),
    "deepseek-ai/DeepSeek-V3": (671, 37),
    "google/gemma-4-26B-A4B": (25.2, 3.8),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (400, 17),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (109, 17),
    "meta-llama/Meta-Llama-3.1-405B": (405, 405),
    "meta-llama/Meta-Llama-3.1-70B": (70.6, 70.6),
    "meta-llama/Meta-Llama-3.1-8B": (8.03, 8.03),
    "mistralai/Mixtral-8x22B-v0.1": (140.6, 39.1),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, 12.9),
    "moonshotai/Kimi-K2-Instruct": (1026, 32.6),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.6, 3.6),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": (120.6, 12.7),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (550, 55),
    "nvidia/Nemotron-H-56B-Base-8K": (56, 56),
    "openai/gpt-oss-120b": (116.8, 5.7),
    "openai/gpt-oss-20b": (20.9, 4.2),
    "zai-org/GLM-5": (744, 40),
}
"""Billions of weights by the makers' model cards, all and for a token; gpt-oss's with its embeddings in both."""


def role(name: str) -> str:
    return ("choosing", "judging")[hashlib.sha256(name.encode()).digest()[0] % 2]


def model_config(name: str) -> dict[str, Any]:
    """Return a config.json of the package, with what stands beside it."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name.replace('/', '--')}_config.json").read_text())
    beside = CONFIGS / f"{name.replace('/', '--')}_hf_quant_config.json"
    if beside.exists() and not config.get("quantization_config"):
        config["quantization_config"] = json.loads(beside.read_text())["quantization"]
    return config


def shape(name: str) -> Any:
    return shape_of_config(model_config(name), name)


@pytest.mark.parametrize("name", PUBLISHED, ids=lambda name: f"{role(name)}-{name}")
def test_weights_are_those_of_the_model_card(name: str) -> None:
    billions, active = PUBLISHED[name]
    assert shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.015)
    assert shape(name).active_parameters / 1e9 == pytest.approx(active, rel=0.16)


def test_both_halves_have_many() -> None:
    roles = [role(name) for name in PUBLISHED]
    assert min(roles.count("choosing"), roles.count("judging")) >= 10


def test_every_config_is_read_or_refused_by_a_key_of_its_own() -> None:
    files = sorted(path.name for path in CONFIGS.glob("*_config.json") if "hf_quant" not in path.name)
    names = [name.removesuffix("_config.json").replace("--", "/") for name in files]
    assert len(names) > 80
    refused = {}
    for name in names:
        try:
            assert shape(name).parameters > 5e8
        except ConfigError as error:
            refused[name] = str(error)
    assert len(names) - len(refused) >= 0.85 * len(names)
    for name, sentence in refused.items():
        key = sentence.split("'")[1]
        config = model_config(name)
        assert key in json.dumps(config), sentence


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("Qwen/Qwen3-32B", 2 * 64 * 8 * 128 * 2),
        ("deepseek-ai/DeepSeek-V3", 61 * (512 + 64) * 2),  # one latent for all heads
        ("Qwen/Qwen3.5-35B-A3B", 2 * 10 * 2 * 256 * 2),  # a quarter of the layers
        ("nvidia/MiniMax-M2.5-NVFP4", 2 * 62 * 8 * 128 * 1),  # in FP8
    ],
)
def test_the_cache_of_a_token(name: str, token_bytes: int) -> None:
    assert shape(name).kv_bytes_per_token == token_bytes


def test_a_window_keeps_no_more_than_it_looks_back() -> None:
    model = shape("openai/gpt-oss-120b")
    row = 2 * 8 * 64 * 2
    assert model.kv_bytes(100) == 36 * 100 * row
    assert model.kv_bytes(10_000) == 18 * (10_000 + 128) * row


def test_devices_beyond_the_heads_have_copies() -> None:
    model = shape("Qwen/Qwen3-235B-A22B")  # four heads of keys
    assert model.kv_bytes(1, 2) == model.kv_bytes(1) / 2
    assert model.kv_bytes(1, 8) == model.kv_bytes(1, 4) == model.kv_bytes(1) / 4
    latent = shape("deepseek-ai/DeepSeek-V3")
    assert latent.kv_bytes(1, 8) == latent.kv_bytes(1)


def test_a_state_does_not_grow() -> None:
    model = shape("Qwen/Qwen3.5-35B-A3B")
    assert model.state_bytes == 30 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("Qwen/Qwen3-32B-FP8", 34.3),
        ("openai/gpt-oss-120b", 65.2),  # 65.2 GB of files
        ("moonshotai/Kimi-K2.5", 594),
        ("nvidia/MiniMax-M2.5-NVFP4", 134),
        ("deepseek-ai/DeepSeek-V3", 673),
    ],
)
def test_weights_take_what_the_quantization_says(name: str, gigabytes: float) -> None:
    assert shape(name).weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_layers_that_are_spared_stay_as_they_are() -> None:
    config = dict(model_config("Qwen/Qwen3-32B"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_not_convert": [f"model.layers.{i}.self_attn" for i in range(16)] + ["re:.*mlp.*"],
    }
    precision = shape_of_config(config, "it").precision
    assert precision.attention == pytest.approx(1 + 16 / 64)
    assert precision.mlp == 2.0


def test_few_tokens_wake_few_experts() -> None:
    experts = Experts(128, 8, 1000, 0)
    assert experts.touched(1) == pytest.approx(8)
    assert experts.touched(2) == pytest.approx(8 + 8 * 120 / 128)
    assert experts.touched(10_000) == pytest.approx(128)
    assert experts.touched(64, skew=1.2) < 0.9 * experts.touched(64)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": None}, "no whole number 'num_hidden_layers'"),
        ({"hidden_size": "64"}, "'hidden_size' must be a whole number"),
        ({"torch_dtype": "float8"}, "'torch_dtype' is 'float8'"),
        ({"hidden_act": "sine"}, "'hidden_act' is 'sine'"),
        ({"some_expert_thing": 4}, "'some_expert_thing' is not understood"),
        ({"layer_types": ["full_attention", "retention"]}, "'layer_types' has 'retention'"),
        ({"layer_types": ["full_attention"]}, "'layer_types' must have an entry for each of the 2 layers"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "'num_experts_per_tok' is 5, of 4 experts"),
        ({"quantization_config": {"quant_method": "magic"}}, "quantization_config.quant_method is 'magic'"),
        ({"quantization_config": {"bits": 3}}, "quantization_config.quant_method is None"),
    ],
)
def test_what_is_not_understood_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        shape_of_config({**LLAMA, **changes}, "it/config.json")
    assert said in str(refused.value)
    assert str(refused.value).startswith("it/config.json: ")


def test_a_plain_one_is_a_plain_one() -> None:
    model = shape_of_config(LLAMA, "it")
    assert model.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 512 * 64
    assert model.weight_bytes == 2 * model.parameters


def test_what_stands_beside_a_config_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    said = {
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    precision = model_shape(str(tmp_path)).precision
    assert (precision.mlp, precision.kv, precision.rest) == (0.5625, 1.0, 2.0)
