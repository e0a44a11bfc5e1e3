"""What a `quantization_config` says of each projection: bytes by hand, and what is refused by its key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.test_config_json import LATENT, LLAMA
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.devices.roofline import device
from vllm_sarathi.simulation.models import model_shape, shape_of_config
from vllm_sarathi.simulation.quantization import Precision

FP8 = {"quant_method": "fp8"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
FOUR = 0.5 + 2.5 / 128
EACH = [f"model.layers.{i}." for i in range(32)]


def precision(said: Any, **changes: Any) -> Precision:
    return shape_of_config({**LLAMA, **changes, "quantization_config": said}, "it").precision


def group(bits: int, size: int | None, *targets: str) -> dict[str, Any]:
    return {"targets": list(targets), "weights": {"num_bits": bits, "type": "int", "group_size": size}}


@pytest.mark.parametrize(
    ("said", "attention", "mlp"),
    [
        (FP8, 1.0, 1.0),
        ({**FP8, "ignored_layers": [f"{each}mlp.down_proj" for each in EACH]}, 1.0, 4 / 3),
        ({**FP8, "modules_to_not_convert": [f"{each}self_attn.o_proj" for each in EACH]}, 1.4, 1.0),
        ({**FP8, "modules_to_not_convert": ["self_attn"]}, 2.0, 1.0),
        ({**FP8, "modules_to_not_convert": [f"{each}mlp.gate_up_proj" for each in EACH]}, 1.0, 5 / 3),
        ({**FP8, "modules_to_not_convert": ["lm_head", "gate", "model.layers.7"]}, 1 + 1 / 32, 1 + 1 / 32),
        ({**FP8, "ignore": ["re:.*self_attn.*", "re:.*layers\\.3\\..*"]}, 2.0, 1 + 1 / 32),
        (
            {**FP8, "exclude_modules": ["model.layers.1*", "*.mlp.up_proj"]},
            1 + 11 / 32,
            (2 * 11 + 32) / 96 + 1,
        ),
        ({**AWQ, "modules_to_not_convert": ["self_attn"]}, 2.0, FOUR),
        ({**AWQ, "quant_method": "gptq", "dynamic": {"-:.*attn.*": {}}}, 2.0, FOUR),
        (
            {**AWQ, "quant_method": "gptq", "dynamic": {"+:.*attn.*": {"bits": 8, "group_size": -1}}},
            1.0,
            FOUR,
        ),
        (
            {
                **AWQ,
                "quant_method": "gptq",
                "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]],
            },
            2.0,
            (2 + 2 * FOUR) / 3,
        ),
        (
            {**AWQ, "quant_method": "auto-round", "extra_config": {"model.layers.0": {"bits": 8}}},
            (31 * FOUR + 1 + 3 / 128) / 32,
            (31 * FOUR + 1 + 3 / 128) / 32,
        ),
        ({"config_groups": {"a": group(4, 128, "re:.*self_attn.*")}}, 0.5 + 2 / 128, 2.0),
        (
            {"config_groups": {"a": group(8, None, "Linear"), "b": group(4, 64, "re:.*mlp.*")}},
            1.0,
            0.5 + 2 / 64,
        ),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {f"{each}mlp.up_proj": {"quant_algo": "FP8"} for each in EACH},
            },
            2.0,
            5 / 3,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
            2.0,
            2.0,
        ),
    ],
)
def test_each_projection_has_its_own(said: Mapping[str, Any], attention: float, mlp: float) -> None:
    found = precision(said)
    assert [found.attention, found.mlp] == pytest.approx([attention, mlp])
    assert found.rest == 2.0


def test_the_layers_that_have_it_are_counted() -> None:
    """Linear attention in three layers of four, experts in all but the first: exceptions count among those alone."""
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 8
    spared = [f"model.layers.{i}.self_attn*" for i in range(3, 32, 8)]
    linear = {f"linear_num_{kind}_heads": 16 for kind in ("key", "value")} | {"linear_conv_kernel_dim": 4}
    linear |= {f"linear_{kind}_head_dim": 128 for kind in ("key", "value")}
    found = precision(
        {**FP8, "exclude_modules": [*spared, "model.layers.1.mlp.experts*", "model.layers.0*"]},
        model_type="qwen3_next", layer_types=kinds, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, mlp_only_layers=[0], head_dim=128, **linear,
    )  # fmt: skip
    assert found.attention == pytest.approx(1.5)
    assert found.state == pytest.approx(1 + 1 / 24)
    assert found.experts == pytest.approx(1 + 1 / 31)
    assert found.mlp == 2.0  # the first layer's alone


def test_a_latents_projections_are_weighed() -> None:
    latent = {**LATENT, "kv_lora_rank": 512, "q_lora_rank": 1536}
    spared = [f"{each}self_attn.o_proj" for each in EACH]
    found = precision({**FP8, "modules_to_not_convert": spared}, **latent)
    output, rest = 32 * 128 * 4096, 4096 * 1536 + 1536 * 32 * 192 + 4096 * 576 + 512 * 32 * 256
    assert found.attention == pytest.approx((2 * output + rest) / (output + rest))


@pytest.mark.parametrize(
    ("said", "kv"),
    [
        ({**FP8, "kv_cache_quant_algo": "FP8"}, 1.0),
        ({**FP8, "kv_cache_quant_algo": "NVFP4"}, 0.5625),
        ({**FP8, "kv_cache_scheme": "FP8"}, 1.0),
        ({**FP8, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 1.0),
        ({**FP8, "kv_cache_quant_algo": None}, 2.0),
    ],
)
def test_the_cache_is_as_the_checkpoint_says(said: Mapping[str, Any], kv: float) -> None:
    assert precision(said).kv == kv


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("fp8", "'quantization_config'"),
        ([], "'quantization_config' must be an object, not []"),
        (False, "'quantization_config' must be an object, not False"),
        ({}, "quantization_config.quant_method is None"),
        ({"quant_method": 8}, "quantization_config.quant_method is 8"),
        ({"load_in_4bit": True}, "quantization_config.quant_method is None"),
        ({**FP8, "ignore": 5}, "quantization_config.ignore"),
        ({**FP8, "ignore": [5]}, "quantization_config.ignore"),
        ({**FP8, "ignore": ["re:(("]}, "quantization_config.ignore"),
        ({**FP8, "modules_to_not_convert": "self_attn"}, "quantization_config.modules_to_not_convert"),
        ({**FP8, "ignored_layers": ["model.layers.0.mixture.w9"]}, "'layers.0.mixture.w9'"),
        ({**FP8, "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "quantization_config.kv_cache_scheme"),
        ({**FP8, "kv_cache_quant_algo": "INT3"}, "quantization_config.kv_cache_quant_algo is 'INT3'"),
        ({**AWQ, "bits": -4}, "quantization_config.bits is -4"),
        ({**AWQ, "bits": 3}, "quantization_config.bits is 3"),
        ({**AWQ, "quant_method": "gptq", "bits": 2}, "quantization_config.bits is 2"),
        ({**AWQ, "bits": "4"}, "quantization_config.bits must be a whole number"),
        ({**AWQ, "group_size": 0}, "quantization_config.group_size is 0"),
        ({**AWQ, "dynamic": [1]}, "quantization_config.dynamic must be an object"),
        ({"config_groups": [1]}, "quantization_config.config_groups must be an object"),
        ({"config_groups": {"g": "x"}}, "quantization_config.config_groups.g must be an object"),
        ({"config_groups": {"g": {"weights": "int4"}}}, "config_groups.g.weights must be an object"),
        ({"config_groups": {"g": {}}}, "config_groups.g has no object 'weights'"),
        ({"config_groups": {"g": group(3, None)}}, "config_groups.g.weights.num_bits is 3"),
        ({"config_groups": {"g": group(4, None, "Conv2d")}}, "config_groups.g.targets names 'Conv2d'"),
        ({"config_groups": {"g": group(4, None), "h": group(8, None)}}, "weights of several widths"),
        ({"quantized_layers": [1]}, "quantization_config.quantized_layers must be an object"),
        ({"quantized_layers": {"layers.0.mlp": "fp8"}}, "quantized_layers.layers.0.mlp must be an object"),
        ({"quantized_layers": {"layers.0.mlp": {"quant_algo": "x"}}}, "has the quant_algo 'x'"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "x"}}, "sparsity_config"),
    ],
)
def test_what_is_not_understood_is_named(said: Any, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        precision(said)
    assert key in str(refused.value)


@pytest.mark.parametrize("nested", [True, False])
def test_what_stands_beside_is_read_nested_or_flat(tmp_path: Path, nested: bool) -> None:
    said = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said} if nested else said))
    assert model_shape(str(tmp_path)).precision.mlp == 0.5625
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {}}')
    with pytest.raises(ConfigError, match="has no 'quant_algo'"):
        model_shape(str(tmp_path))


def grouped(bits: int, kind: str, size: int | None, inputs: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "group_size": size}
    return {"quant_method": "compressed-tensors"} | {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    }


@pytest.mark.parametrize(
    ("said", "unit", "times"),
    [
        (AWQ, "b200", 1.0),
        ({**AWQ, "quant_method": "gptq", "bits": 8}, "h100", 1.0),
        (grouped(4, "int", 32, None), "b200", 1.0),  # Kimi-K2-Thinking
        (grouped(4, "float", 16, None), "b200", 1.0),
        (grouped(4, "float", 16, {"num_bits": 4, "type": "float"}), "b200", 4.0),
        (grouped(8, "float", None, {"num_bits": 8, "type": "float"}), "h100", 2.0),
        (grouped(8, "float", None, {"num_bits": 8, "type": "float"}), "a100", 1.0),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "b200", 1.0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "b200", 4.0),
        (FP8, "h200", 2.0),
    ],
)
def test_products_are_as_quick_as_what_they_multiply(said: Any, unit: str, times: float) -> None:
    assert device(unit).speed_up(precision(said)) == times


@pytest.mark.parametrize(
    "groups", [{}, {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}]
)
def test_sparse_weights_are_refused_with_groups_and_without(groups: dict[str, Any]) -> None:
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    sparse = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    with pytest.raises(ConfigError, match="sparsity_config is not understood"):
        precision({**said, "sparsity_config": sparse})
    for none in ({}, {"format": "dense"}):
        assert precision({**said, "sparsity_config": none}) == precision(said)


def test_a_module_of_a_layer_that_is_not_there_is_a_warning() -> None:
    said = {**FP8, "ignored_layers": ["model.layers.31.mlp.gate_proj", "model.layers.99.mlp.gate_proj"]}
    config = {**LLAMA, "quantization_config": said}
    assert shape_of_config(config, "it").unread == ("quantization_config (layers.99.mlp.gate_proj)",)
    # Layers that only draft are numbered after the others.
    assert shape_of_config({**config, "num_nextn_predict_layers": 1}, "it").unread == ()
