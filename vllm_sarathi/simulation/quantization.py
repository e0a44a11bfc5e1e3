"""In how many bits a checkpoint's weights and its KV cache are, by the `quantization_config` of its config.json."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_sarathi.core.config import ConfigError

MODULES = {
    "attention": ("self_attn.o_proj", "mixer.o_proj", "attention.wo"),
    "state": ("linear_attn.out_proj", "mixer.out_proj"),
    "mlp": ("mlp.down_proj", "mixer.down_proj", "feed_forward.down_proj"),
    "shared": (
        "mlp.shared_experts.down_proj",
        "mlp.shared_expert.down_proj",
        "block_sparse_moe.shared_experts.down_proj",
        "mixer.shared_experts.down_proj",
        "feed_forward.shared_expert.down_proj",
    ),
    "experts": (
        "mlp.experts.0.down_proj",
        "mlp.experts",
        "block_sparse_moe.experts.0.w2",
        "mixer.experts.0.down_proj",
        "feed_forward.experts.down_proj",
        "experts.0.down_proj",
    ),
}
"""What modules are called inside a layer, by what they are; a list of exceptions in a checkpoint names some."""

PREFIXES = (
    "model.layers.",
    "language_model.model.layers.",
    "model.language_model.layers.",
    "backbone.layers.",
)


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of an element, scales included.

    Attributes:
        attention, state, mlp, shared, experts: of weights, by MODULES.
        rest: of embeddings, the output, norms.
        kv: of the KV cache.
    """

    attention: float = 2.0
    state: float = 2.0
    mlp: float = 2.0
    shared: float = 2.0
    experts: float = 2.0
    rest: float = 2.0
    kv: float = 2.0

    @classmethod
    def of(cls, element_bytes: float) -> "Precision":
        """Return it for a checkpoint that is not quantized."""
        return cls(*[element_bytes] * 7)

    def with_weights(self, element_bytes: float) -> "Precision":
        """Return it with all that is quantized in a layer in `element_bytes`."""
        return replace(self, **dict.fromkeys(MODULES, element_bytes))


NAMED_BYTES = {"fp8": 1.0, "nvfp4": 0.5 + 1 / 16, "int4": 0.5 + 2 / 128}
"""Bytes of a weight in the precisions that a deployment's name may ask for."""


def precision_of(config: Mapping[str, Any], element_bytes: float, layers: int, origin: str) -> Precision:
    """Return the precision that a config.json states.

    Args:
        config: the config.json, with `quantization_config` or `compression_config` where it has one.
        element_bytes: of what is not quantized.
        layers: of the model: exceptions may name some of them.
        origin: what errors call it.

    Raises:
        ConfigError: a scheme that is not understood; the key is named.
    """
    plain = Precision.of(element_bytes)
    key = next((k for k in ("quantization_config", "compression_config") if config.get(k)), None)
    if key is None:
        return plain
    said = config[key]
    if not isinstance(said, Mapping):
        raise ConfigError(f"{origin}: {key!r} must be an object, not {said!r}.")
    if said.get("quantized_layers"):
        made = _by_layer(said, plain, origin, f"{key}.quantized_layers")
    else:
        weight = _weight_bytes(said, origin, key)
        spared = [*(said.get("ignore") or ()), *(said.get("modules_to_not_convert") or ())]
        is_spared = _spared([*spared, *(said.get("exclude_modules") or ())])
        made = replace(
            plain,
            **{
                kind: _mean_bytes(_names(kind, config), is_spared, layers, weight, element_bytes)
                for kind in MODULES
            },
        )
        if str(said.get("quant_method")) == "mxfp4":
            made = replace(made, attention=element_bytes, mlp=element_bytes, shared=element_bytes)
    kv = said.get("kv_cache_scheme")
    algorithm = str(said.get("kv_cache_quant_algo") or said.get("kv_cache_quant_method") or "").lower()
    if algorithm == "fp8" or (isinstance(kv, Mapping) and kv.get("num_bits") == 8):
        made = replace(made, kv=1.0)
    return made


def _names(kind: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what modules of a kind may be called; experts beside an MLP are no part of it."""
    beside = kind == "experts" and config.get("enable_moe_block")
    return tuple(name for name in MODULES[kind] if not (beside and name.startswith("mlp.")))


def _weight_bytes(said: Mapping[str, Any], origin: str, key: str) -> float:
    """Return the bytes of a quantized weight, scales included."""
    method = str(said.get("quant_method") or "").lower()
    algorithm = str(said.get("quant_algo") or "").lower()
    groups = said.get("config_groups")
    if isinstance(groups, Mapping) and groups and algorithm != "mixed_precision":
        found = {_group_bytes(group, origin, key) for group in groups.values()}
        if len(found) == 1:
            return found.pop()
        raise ConfigError(
            f"{origin}: {key}.config_groups has weights of several widths, and says not which layers have which."
        )
    if method in ("awq", "gptq", "auto-round"):
        bits, size = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
        if isinstance(bits, int) and isinstance(size, int):
            return bits / 8 + ((2 + bits / 8) / size if size > 0 else 0.0)
    for name in (algorithm, method):
        known = {
            "fp8": 1.0,
            "fbgemm_fp8": 1.0,
            "nvfp4": 0.5 + 1 / 16,
            "mxfp4": 0.5 + 1 / 32,
            "mxfp8": 1 + 1 / 32,
        }
        if name.removeprefix("w4a16_") in known:
            return known[name.removeprefix("w4a16_")]
    stated = "quant_algo" if algorithm else "quant_method"
    raise ConfigError(
        f"{origin}: {key}.{stated} is {said.get(stated)!r}, which is not understood; known are fp8, nvfp4, mxfp4, "
        "awq, gptq and compressed-tensors."
    )


def _group_bytes(group: Mapping[str, Any], origin: str, key: str) -> float:
    weights = group.get("weights") or {}
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if bits not in (4, 8):
        raise ConfigError(
            f"{origin}: {key}.config_groups.weights.num_bits is {bits!r}; understood are 4 and 8."
        )
    if weights.get("type") == "float" and bits == 4:
        return 0.5 + 1 / (size or 16)
    return float(bits / 8 + (2 / size if size else 0.0))


def _by_layer(said: Mapping[str, Any], plain: Precision, origin: str, key: str) -> Precision:
    """Return the precision where each quantized module is listed with its own."""
    found: dict[str, list[float]] = {}
    for module, how in said["quantized_layers"].items():
        kind = _kind_of(module)
        if kind is not None:
            found.setdefault(kind, []).append(
                _weight_bytes({"quant_algo": how.get("quant_algo")}, origin, key)
            )
    return replace(plain, **{kind: sum(widths) / len(widths) for kind, widths in found.items()})


def _kind_of(module: str) -> str | None:
    if "shared_expert" in module:
        return "shared"
    if "experts" in module:
        return "experts"
    if "self_attn" in module or re.search(r"mixer\.[qkvo]_proj", module):
        return "attention"
    if "linear_attn" in module or re.search(r"mixer\.(in|out)_proj", module):
        return "state"
    return "mlp" if re.search(r"(mlp|mixer|feed_forward)\.(gate|up|down)", module) else None


def _mean_bytes(
    names: Iterable[str],
    spared: Callable[[str], bool],
    layers: int,
    weight: float,
    element_bytes: float,
) -> float:
    """Return the bytes of an element, over the layers of which some may be spared."""
    left = sum(
        any(spared(f"{prefix}{layer}.{name}") for prefix in PREFIXES for name in names)
        for layer in range(layers)
    )
    return weight + (element_bytes - weight) * left / layers


def _spared(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return what says whether a module is on a list of exceptions: names, globs, and `re:` expressions."""
    listed = list(patterns)
    plain = frozenset(pattern for pattern in listed if "*" not in pattern and not pattern.startswith("re:"))
    expressions = [
        pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
        for pattern in listed
        if pattern not in plain
    ]
    wild = re.compile("|".join(f"(?:{text})" for text in expressions)) if expressions else None

    def is_spared(module: str) -> bool:
        parts = module.split(".")
        if any(".".join(parts[:count]) in plain for count in range(1, len(parts) + 1)):
            return True
        return wild is not None and wild.match(module) is not None

    return is_spared
