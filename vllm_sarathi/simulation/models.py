"""The shapes of decoder models, as their config.json states them; no weights."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.config_json import dense_width, grouped, is_tied
from vllm_sarathi.simulation.config_reader import read_config
from vllm_sarathi.simulation.config_rope import longest_sequence
from vllm_sarathi.simulation.config_special import layer_inputs, layers_of, with_own_experts
from vllm_sarathi.simulation.config_states import element_bytes
from vllm_sarathi.simulation.layers import Attention, Experts, LayerKind, grouped_attention
from vllm_sarathi.simulation.quantization import (
    QUANTIZED_BESIDE,
    Precision,
    layers_beyond,
    precision_of,
    stated_beside,
)
from vllm_sarathi.simulation.weight_blocks import Blocks, blocks_of


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer.

    Attributes:
        layers: transformer blocks.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: of the attention.
        intermediate: width of the MLP.
        vocab: entries of the vocabulary.
        max_position: the longest sequence that vLLM serves by default, tokens.
        gated: whether the MLP has a gate (three matrices instead of two).
        tied: whether input and output embeddings share their weights.
        dtype_bytes: bytes of an element of what is not quantized.
        described: its layers, where they are not all of one dense kind.
        stated: bytes of its weights and its KV cache, where they are not all of `dtype_bytes`.
        skew: of the experts' loads: see `layers.Experts.chances`.
        unread: keys of its config.json that were not used, or not all of them, and may matter.
        layer_inputs: weights of embeddings that layers take as inputs of their own.
        blocks: what devices share of it, where its weights are in block-scaled FP8.
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
    described: tuple[LayerKind, ...] = ()
    stated: Precision | None = None
    skew: float = 0.0
    unread: tuple[str, ...] = ()
    layer_inputs: int = 0
    blocks: Blocks | None = None

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Its layers, those that are alike together."""
        if self.described:
            return self.described
        attention = grouped_attention(self.hidden, self.heads, self.kv_heads, self.head_dim)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return (LayerKind(self.layers, attention, mlp_parameters=mlp),)

    @property
    def precision(self) -> Precision:
        """Bytes of its weights and of its KV cache."""
        return self.stated or Precision.of(self.dtype_bytes)

    def weights_in(self, element_bytes: float) -> "ModelShape":
        """Return the shape with the weights that precisions are about in `element_bytes`."""
        return replace(self, stated=self.precision.with_weights(element_bytes))

    def kv_in(self, element_bytes: float) -> "ModelShape":
        """Return the shape with a KV cache of `element_bytes`."""
        return replace(self, stated=replace(self.precision, kv=element_bytes))

    @property
    def layer_parameters(self) -> int:
        """Weights of one block's linear layers, on average over the blocks; all experts are counted."""
        return round(sum(kind.count * _parameters(kind) for kind in self.kinds) / self.layers)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embeddings."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.layer_inputs

    @property
    def parameters(self) -> int:
        """All weights, embeddings included."""
        stored = sum(kind.count * _parameters(kind) for kind in self.kinds if not kind.borrowed)
        return stored + self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that a token goes through, embeddings included."""
        return (
            sum(kind.count * _parameters(kind, active=True) for kind in self.kinds)
            + self.embedding_parameters
        )

    @property
    def experts(self) -> Experts | None:
        """Its experts; None without."""
        return next((kind.experts for kind in self.kinds if kind.experts), None)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        stored = [kind for kind in self.kinds if not kind.borrowed]
        layers = sum(kind.count * (self.dense_bytes(kind) + self.expert_bytes(kind)) for kind in stored)
        return layers + self.embedding_parameters * self.precision.rest

    def dense_bytes(self, kind: LayerKind) -> float:
        """Return the bytes of the weights of one layer that every token goes through."""
        precision = self.precision
        total = kind.mlp_parameters * precision.mlp + kind.other_parameters * precision.rest
        total += kind.attention.parameters * precision.attention if kind.attention else 0
        total += kind.state.parameters * precision.state if kind.state else 0
        return total + (kind.experts.shared_parameters * precision.shared if kind.experts else 0)

    def expert_bytes(self, kind: LayerKind) -> float:
        """Return the bytes of all experts of one layer."""
        experts = kind.experts
        return experts.count * experts.parameters * self.precision.experts if experts else 0.0

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache that one token takes over all layers that keep every token, on one device."""
        return self.kv_bytes(1, 1)

    def kv_bytes(self, tokens: float, tensor_parallel: int = 1) -> float:
        """Return the bytes of KV cache that one request of `tokens` takes on one device.

        Keys and values are shared by tensor parallel as far as there are heads of them; beyond, devices have copies.
        A window keeps no more than it looks back.

        Args:
            tokens: of the request.
            tensor_parallel: devices that share a layer.
        """
        total = 0.0
        for kind in self.kinds:
            for attention in kind.attentions:
                if not attention.stores:
                    continue
                share = max(1.0, attention.kv_heads / tensor_parallel) / attention.kv_heads
                kept = tokens if attention.window is None else min(tokens, attention.window)
                total += kind.count * share * kept * self.kv_token_bytes(attention)
        return total

    def kv_token_bytes(self, attention: Attention) -> float:
        """Return the bytes of one token in a layer's KV cache."""
        return attention.kv_elements * self.precision.kv + attention.kv_bytes

    @property
    def state_bytes(self) -> float:
        """Bytes that one request takes for the states of linear attention and Mamba, over all layers."""
        return float(sum(kind.count * kind.state.state_bytes for kind in self.kinds if kind.state))


def _parameters(kind: LayerKind, active: bool = False) -> int:
    total = kind.mlp_parameters + kind.other_parameters
    total += kind.attention.parameters if kind.attention else 0
    total += kind.state.parameters if kind.state else 0
    if kind.experts:
        count = kind.experts.active if active else kind.experts.count
        total += kind.experts.shared_parameters + count * kind.experts.parameters
    return total


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

CHECKPOINTS = {
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "yi-34b": "01-ai/Yi-34B",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "falcon-180b": "tiiuae/falcon-180B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""What can be served of each, by its name on a hub."""


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
            f"{_hint(name, elsewhere)} Any other model is a folder with its config.json: FOLDER/DEVICE."
        )
    config = _read_object(path)
    beside = path.with_name(QUANTIZED_BESIDE)
    if beside.is_file() and not config.get("quantization_config"):
        config["quantization_config"] = stated_beside(_read_object(beside), str(beside))
    return shape_of_config(config, str(path))


def _hint(name: str, elsewhere: Iterable[str]) -> str:
    """Return the nearest model, or those with a short name and how many others there are."""
    hint, others = nearest_hint(name, (*MODELS, *elsewhere)), len(set(elsewhere))
    if hint.startswith("did you mean") or not others:
        return hint
    return f"valid: {', '.join(sorted(MODELS))}, and {others} models by their names on a hub, such as Qwen/Qwen3-8B."


def _read_object(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(read).__name__}.")
    return read


def shape_of_config(config: Mapping[str, Any], origin: str) -> ModelShape:
    """Return the shape that a config.json describes; `origin` names it in errors.

    Raises:
        ConfigError: a key is missing, or says something that is not understood; it is named.
    """
    read = read_config(config, origin)
    layers = layers_of(read)
    alone = read.family.state_in == "alone"
    hidden = read.number("hidden_size")
    heads = read.number("num_attention_heads", "mamba_num_heads", default=hidden if alone else None)
    attention = next((layer.attention for layer in layers if layer.attention), None)
    embedded = read.number("word_embed_proj_dim", default=hidden)
    if embedded != hidden:
        raise read.error(
            f"'word_embed_proj_dim' is {embedded}, which is not understood beside a width of {hidden}."
        )
    widest = max(layer.mlp_parameters for layer in layers) // (hidden * read.family.matrices)
    width = (
        read.number("moe_intermediate_size", default=0) or widest or (hidden if alone else dense_width(read))
    )
    return ModelShape(
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        kv_heads=attention.kv_heads if attention else heads,
        head_dim=read.number("head_dim", "attention_head_dim", default=hidden // heads),
        intermediate=width,
        vocab=read.number("vocab_size"),
        max_position=longest_sequence(read),
        gated=read.family.gated,
        tied=is_tied(read),
        dtype_bytes=element_bytes(read),
        described=grouped(layers),
        stated=with_own_experts(
            read, precision_of(read.config, element_bytes(read), layers, read.family.gated, origin)
        ),
        layer_inputs=layer_inputs(read, len(layers)),
        blocks=blocks_of(read, layers),
        unread=(*read.unread(), *layers_beyond(read.config, len(layers), origin)),
    )
