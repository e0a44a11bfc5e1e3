"""Tensor parallelism that cuts the blocks of FP8 weights: refused where vLLM's own functions refuse it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.simulation.test_config_json import LATENT, LLAMA, shape
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.placement import DoesNotFit

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}},
}
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 128,
}


def cut(ways: int, whole_experts: bool = False, **changes: Any) -> str | None:
    blocks = shape(**{"quantization_config": FP8, **changes}).blocks
    assert blocks is not None
    return blocks.cut(ways, whole_experts)


@pytest.mark.parametrize("ways", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("finer", [True, False])
@pytest.mark.parametrize("width", [320, 512, 704, 768, 1280, 1408, 1536, 2048])
def test_experts_are_cut_where_vllm_cuts_them(
    width: int, finer: bool, ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import distributed
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape_moe

    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: ways)
    share: Any = SimpleNamespace(intermediate_size_per_partition=width // ways, tp_size=ways, hidden_dim=4096)
    refused = False
    if not finer or refine_fp8_moe_block_shape(share, [128, 128]) is None:
        try:
            validate_fp8_block_shape_moe(width // ways, [128, 128])
        except ValueError:
            refused = True
    said = FP8 if finer else COMPRESSED
    found = cut(ways, **MIXTURE, moe_intermediate_size=width, quantization_config=said)
    assert (found is not None) is refused


@pytest.mark.parametrize("ways", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [9728, 12288, 14336, 25600])
def test_a_dense_mlp_is_cut_where_vllm_cuts_it(
    width: int, ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import distributed
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape

    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: ways)
    refused = False
    layer: Any = SimpleNamespace(tp_size=ways)
    try:
        validate_fp8_block_shape(layer, width, 4096, width // ways, [4096], [128, 128])
    except ValueError:
        refused = True
    assert (cut(ways, intermediate_size=width) is not None) is refused


@pytest.mark.parametrize(
    ("ways", "changes", "said"),
    [
        (8, {"intermediate_size": 9728}, "down_proj has 9728 / 8 = 1216 on each device, no multiple of 128"),
        (8, {"head_dim": 80, "num_key_value_heads": 8}, "o_proj has 2560 / 8 = 320"),
        (
            8,
            {**MIXTURE, "moe_intermediate_size": 704},
            "an expert has 704 / 8 = 88 on each device, no multiple of 128, nor of 32",
        ),
        (8, {**MIXTURE, "moe_intermediate_size": 768}, None),
        (
            8,
            {**MIXTURE, "moe_intermediate_size": 768, "quantization_config": COMPRESSED},
            "an expert has 768 / 8 = 96 on each device, no multiple of 128",
        ),
        # What every token goes through is shared by the devices, however the experts are.
        (
            8,
            {**MIXTURE, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
            "down_proj has 512 / 8 = 64",
        ),
        (
            4,
            {**LATENT, "kv_lora_rank": 512, "q_lora_rank": 768, "num_attention_heads": 20, "v_head_dim": 256}
            | {"qk_nope_head_dim": 192},
            "kv_b_proj has 8960 / 4 = 2240",
        ),
        (8, {"model_type": "nemotron", "intermediate_size": 9728}, "down_proj has 9728 / 8 = 1216"),
    ],
)
def test_what_is_cut_is_named_with_the_arithmetic(
    ways: int, changes: dict[str, Any], said: str | None
) -> None:
    found = cut(ways, **changes)
    assert (found is None) if said is None else (found is not None and said in found)


def test_whole_experts_and_what_is_not_quantized_are_not_cut() -> None:
    assert cut(8, whole_experts=True, **MIXTURE, moe_intermediate_size=1408) is None
    spared = {**FP8, "modules_to_not_convert": ["mlp"]}
    assert cut(8, intermediate_size=9728, quantization_config=spared) is None
    assert shape(quantization_config={"quant_method": "fp8"}).blocks is None


def test_a_deployment_that_cuts_blocks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "intermediate_size": 9728, "quantization_config": FP8})
    )
    with pytest.raises(DoesNotFit, match="in blocks, and down_proj has 9728 / 8 = 1216 on each device"):
        deployment(f"{tmp_path}/h100:tp8")
    assert deployment(f"{tmp_path}/h100:tp4").tensor_parallel == 4
    pytest.importorskip("aiconfigurator_core")
    with pytest.raises(DoesNotFit, match="an expert has 768 / 16 = 48"):
        deployment("Qwen/Qwen3-30B-A3B-FP8/h200:tp16")
