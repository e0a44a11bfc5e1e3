"""The shapes of decoder models, as their config.json states them; no weights."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import ConfigError, nearest_hint


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder-only transformer.

    Attributes:
        layers: transformer blocks.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: of the attention.
        intermediate: width of the MLP.
        vocab: entries of the vocabulary.
        max_position: the longest sequence it is made for, tokens.
        gated: whether the MLP has a gate (three matrices instead of two).
        tied: whether input and output embeddings share their weights.
        dtype_bytes: bytes of one weight or KV element.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    gated: bool = True
    tied: bool = False
    dtype_bytes: int = 2

    @property
    def layer_parameters(self) -> int:
        """Weights of one block's linear layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All weights, embeddings included."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes over all layers, on one device of its own."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


MODELS: dict[str, ModelShape] = {
    "mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14336, 32000, 32768),
    "yi-34b": ModelShape(60, 7168, 56, 8, 128, 20480, 64000, 4096),
    "llama2-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 32000, 4096),
    "falcon-180b": ModelShape(80, 14848, 232, 8, 64, 59392, 65024, 2048, gated=False, tied=True),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 131072),
    "llama-3.1-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256, 131072),
    "qwen3-32b": ModelShape(64, 5120, 64, 8, 128, 25600, 151936, 40960),
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True),
}
"""Shapes by name, from each model's published config.json."""


class UnknownModel(ConfigError):
    """A name that is neither a model's nor a file's."""


def model_shape(name: str, elsewhere: Iterable[str] = ()) -> ModelShape:
    """Return a model's shape.

    Args:
        name: a name from MODELS, a config.json, or a folder that holds one.
        elsewhere: names that the caller knows without a shape, for the error.

    Raises:
        UnknownModel: no such name or file.
        ConfigError: a file that lacks a key, or that is no dense model's.
    """
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UnknownModel(
            f"--deployment: unknown model {name!r}, and no config.json is there; "
            f"{nearest_hint(name, (*MODELS, *elsewhere))}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(config).__name__}.")
    return shape_of_config(config, str(path))


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

NOT_DENSE = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "moe_num_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
    "quantization_config": "quantized weights",
    "compression_config": "quantized weights",
    "linear_num_value_heads": "linear attention",
    "full_attention_interval": "linear attention",
    "attn_layer_period": "Mamba layers",
    "hybrid_override_pattern": "Mamba layers",
    "mamba_d_state": "Mamba layers",
    "ssm_cfg": "Mamba layers",
    "block_configs": "layers of several shapes",
}
"""Keys of a config.json that say that a model is none of those described by ModelShape, where they are set."""


def _check_dense(config: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError naming the key that says that a model is more than a dense one of 16 or 32 bits."""
    said = {
        key: what for key, what in NOT_DENSE.items() if config.get(key) not in (None, 0, False, {}, [], "")
    }
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        said["layer_types"] = f"layers of {', '.join(sorted(kinds))}"
    window = config.get("sliding_window")
    positions = config.get("max_position_embeddings") or 0
    if isinstance(window, int) and window < positions and config.get("use_sliding_window", True):
        said["sliding_window"] = "attention within a window"
    dtype = config.get("torch_dtype") or config.get("dtype")
    if dtype is not None and str(dtype) not in DTYPE_BYTES:
        said["torch_dtype" if "torch_dtype" in config else "dtype"] = f"weights of {dtype}"
    for key, what in said.items():
        raise ConfigError(
            f"{origin}: {key!r} says {what}, which a roofline of a dense model would get wrong; a model of "
            "aiconfigurator-core (pip install 'vllm-sarathi[devices]'), named OWNER/MODEL, has measured times."
        )


def shape_of_config(config: Mapping[str, Any], origin: str) -> ModelShape:
    """Return the shape that a config.json describes; `origin` names it in errors.

    Raises:
        ConfigError: a key is missing, or one says that the model is no dense one of 16 or 32 bits.
    """
    _check_dense(config, origin)
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    for key in keys:
        if not isinstance(config.get(key), int):
            raise ConfigError(
                f"{origin}: has no whole number {key!r}; a decoder's config.json has {', '.join(keys)}."
            )
    layers, hidden, heads, vocab = (config[key] for key in keys)
    intermediate = config.get("intermediate_size") or config.get("ffn_hidden_size") or 4 * hidden
    activation = str(config.get("hidden_act", "silu"))
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or config.get("num_kv_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        max_position=config.get("max_position_embeddings") or 2048,
        gated=activation in ("silu", "swiglu", "geglu", "gelu_pytorch_tanh"),
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype_bytes=DTYPE_BYTES.get(str(config.get("torch_dtype") or config.get("dtype")), 2),
    )
