"""The longest sequence that is served by default, compared with what vLLM takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.models import shape_of_config

FACTORS = [1.0] * 8
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
PHI = {
    **LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 8192,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("config", "rope", "longest"),
    [
        (LLAMA, None, 4096),
        (LLAMA, {"type": "linear", "factor": 4.0}, 16384),
        (LLAMA, {"rope_type": "dynamic", "factor": 2}, 8192),
        (LLAMA, YARN, 4096),
        (LLAMA, LLAMA3, 4096),
        (PHI, {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}, 8192),
    ],
)
def test_the_longest_sequence_is_what_vllm_takes(
    config: dict[str, Any], rope: dict[str, Any] | None, longest: int, tmp_path: Path
) -> None:
    vllm = pytest.importorskip("vllm.config")
    stated = config if rope is None else {**config, "rope_scaling": {"rope_theta": 10000.0, **rope}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert shape_of_config(stated, "config.json").max_position == longest
    assert vllm.ModelConfig(model=str(tmp_path), skip_tokenizer_init=True).max_model_len == longest


def test_layers_may_have_ropes_of_their_own() -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default"},
    }
    assert shape_of_config({**LLAMA, "rope_parameters": ropes}, "config.json").max_position == 8 * 4096


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ("linear", "'rope_scaling' must be an object, not 'linear'"),
        ({"type": "linear", "factor": "4"}, "factor of its 'rope_scaling' must be from 1 to 1e6, not '4'"),
        ({"type": "linear", "factor": -4}, "must be from 1 to 1e6, not -4"),
    ],
)
def test_what_is_no_scaling_is_refused(rope: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shape_of_config({**LLAMA, "rope_scaling": rope}, "config.json")
