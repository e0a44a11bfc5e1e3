"""What a model allows: how it can be spread over devices, and how long its requests may be."""

import contextlib
from dataclasses import dataclass

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.config_reader import INNER
from vllm_sarathi.simulation.devices.package import BLOCK_FP8, Spread, known_models, model_config, read_config
from vllm_sarathi.simulation.models import ModelShape, UnknownModel, model_shape, shape_of_config
from vllm_sarathi.simulation.placement import DoesNotFit
from vllm_sarathi.simulation.quantization import METHODS, NAMED_BYTES
from vllm_sarathi.simulation.weight_blocks import Blocks


@dataclass(frozen=True)
class Limits:
    """What bounds how a model can be spread over devices.

    Attributes:
        heads, kv_heads: of its attention; for a latent, which every device has, one of keys.
        layers: of the model.
        experts: whether it has any.
        weight_bytes: of a quantized weight; None for a checkpoint that is not quantized.
        blocks: what devices share of it, where its weights are in block-scaled FP8.
    """

    heads: int
    kv_heads: int
    layers: int
    experts: bool
    weight_bytes: float | None
    blocks: Blocks | None

    @classmethod
    def of(cls, shape: ModelShape) -> "Limits":
        """Return those of a shape."""
        least = min(shape.precision.mlp, shape.precision.experts, shape.precision.attention)
        quantized = least if least < shape.dtype_bytes else None
        experts = shape.experts is not None
        return cls(shape.heads, shape.kv_heads, shape.layers, experts, quantized, shape.blocks)


def limits_of(model_name: str) -> Limits:
    """Return those of a model by name.

    Raises:
        ConfigError: an unknown model; or a config.json that is not understood.
    """
    hub_name = known_models().get(model_name.lower())
    return Limits.of(described_shape(model_name)) if hub_name is None else _known_limits(hub_name)


def max_tokens_of(model_name: str) -> int:
    """Return the longest request that a model takes by itself, prompt and answer, tokens.

    Raises:
        ConfigError: as for `limits_of`.
    """
    hub_name = known_models().get(model_name.lower())
    return (
        described_shape(model_name).max_position
        if hub_name is None
        else int(read_config(hub_name)["context"])
    )


def _known_limits(hub_name: str) -> Limits:
    """Return those of a model that aiconfigurator-core knows."""
    config = read_config(hub_name)
    said = config["raw_config"]
    decoder = next((said[key] for key in INNER if said.get(key)), said)
    kv_heads = 1 if decoder.get("kv_lora_rank") else int(config["n_kv"])
    width = METHODS.get(str(said["quant_algo"]).removesuffix("_block")) if said.get("quant_algo") else None
    blocks = None
    if said.get("quant_algo") == BLOCK_FP8:
        with contextlib.suppress(ConfigError):  # what is not understood here may be measured all the same
            blocks = shape_of_config(model_config(hub_name), hub_name).blocks
    heads, layers, experts = int(config["n"]), int(config["layers"]), bool(config["num_experts"])
    return Limits(heads, kv_heads, layers, experts, width, blocks)


def check_spread(name: str, model_name: str, spread: Spread, limits: Limits) -> None:
    """Refuse what vLLM refuses, and what would change nothing.

    Raises:
        ConfigError: so it is.
    """
    ways, origin = spread.tensor_parallel, f"--deployment {name!r}"
    if not limits.experts and (spread.expert_parallel or spread.skew is not None):
        said = "'ep' distributes" if spread.expert_parallel else "'skew' is of the loads of"
        raise ConfigError(f"{origin}: {said} experts, and {model_name} has none.")
    if limits.heads % ways:
        raise DoesNotFit(f"{origin}: {limits.heads} attention heads cannot be shared by {ways} devices.")
    if max(limits.kv_heads, ways) % min(limits.kv_heads, ways):
        raise DoesNotFit(
            f"{origin}: {limits.kv_heads} heads of keys cannot be shared by {ways} devices, nor copied evenly."
        )
    if spread.stages > limits.layers:
        raise DoesNotFit(f"{origin}: {spread.stages} stages for {limits.layers} layers.")
    cut = limits.blocks.cut(ways, spread.expert_parallel) if limits.blocks else None
    if cut is not None:
        raise DoesNotFit(f"{origin}: the checkpoint's FP8 weights are in blocks, and {cut}; vLLM refuses it.")
    asked = None if spread.precision is None else NAMED_BYTES[spread.precision]
    if asked is not None and limits.weight_bytes is not None and asked != limits.weight_bytes:
        raise ConfigError(
            f"{origin}: the checkpoint is quantized already, and vLLM does not quantize it again to "
            f"{spread.precision}; leave {spread.precision!r} out."
        )


def described_shape(model_name: str) -> ModelShape:
    """Return the shape of a model that no package knows; the error says what would know more."""
    names = sorted(set(known_models().values()))
    try:
        return model_shape(model_name, names)
    except UnknownModel as error:
        if names or "/" not in model_name:
            raise
        raise ConfigError(
            f"{error} Models by their names on a hub need pip install 'vllm-sarathi[devices]'."
        ) from error
