"""In how many bits a checkpoint's weights and its KV cache are, by the `quantization_config` of its config.json."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sarathi.core.errors import ConfigError, short
from vllm_sarathi.simulation.checkpoint_modules import PARTS, Listed, names_of, projections_of
from vllm_sarathi.simulation.layers import LayerKind


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of an element, scales included.

    Attributes:
        attention, state, mlp, shared, experts: of weights, by checkpoint_modules.PARTS.
        rest: of embeddings, the output, norms.
        kv: of the KV cache.
        widened: whether its products are in 16 bits whatever its weights are in: of weights alone that are quantized.
    """

    attention: float = 2.0
    state: float = 2.0
    mlp: float = 2.0
    shared: float = 2.0
    experts: float = 2.0
    rest: float = 2.0
    kv: float = 2.0
    widened: bool = False

    @classmethod
    def of(cls, element_bytes: float) -> "Precision":
        """Return it for a checkpoint that is not quantized."""
        every: dict[str, Any] = dict.fromkeys((*PARTS, "rest", "kv"), element_bytes)
        return cls(**every)

    def with_weights(self, element_bytes: float) -> "Precision":
        """Return it with all that is quantized in a layer in `element_bytes`."""
        every: dict[str, Any] = dict.fromkeys(PARTS, element_bytes)
        return replace(self, **every)


NVFP4_BYTES, MXFP4_BYTES = 0.5 + 1 / 16, 0.5 + 1 / 32

NAMED_BYTES = {"fp8": 1.0, "nvfp4": NVFP4_BYTES}
"""Bytes of a weight in the precisions that a deployment's name may ask for."""

METHODS = {
    "fp8": 1.0,
    "fbgemm_fp8": 1.0,
    "nvfp4": NVFP4_BYTES,
    "mxfp4": MXFP4_BYTES,
    "gpt_oss_mxfp4": MXFP4_BYTES,
    "mxfp8": 1 + 1 / 32,
}
"""Bytes of a weight by `quant_method` or `quant_algo`, where that says it all."""

GROUPED = ("awq", "gptq", "auto-round", "auto_awq", "auto_gptq", "gptq_marlin", "awq_marlin", "inc")
"""Methods that have `bits` and `group_size`."""

ROUNDED = ("auto-round", "inc")
"""Those of AutoRound."""

SPARED = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
"""Keys with the modules that are not quantized."""

QUANTIZED_BESIDE = "hf_quant_config.json"
"""Where ModelOpt says how a checkpoint is quantized whose config.json does not."""

KV_BYTES = {"fp8": 1.0, "nvfp4": NVFP4_BYTES}
"""Bytes of an element of the KV cache, by what a checkpoint says of it."""


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's modules are quantized.

    Attributes:
        plain: bytes of an element of a module that is not.
        spared: those that are not.
        rules: which modules have weights of how many bytes; the first that names one counts, None names all.
    """

    plain: float
    spared: Listed
    rules: tuple[tuple[Listed | None, float], ...]

    def bytes_of(self, layer: int, names: Sequence[str]) -> float:
        """Return the bytes of an element of a module that may have several names."""
        if any(self.spared.has(layer, name) for name in names):
            return self.plain
        for listed, width in self.rules:
            if listed is None or any(listed.has(layer, name) for name in names):
                return width
        return self.plain

    def of_layer(self, layer: int) -> Hashable:
        """Return what is listed of a layer: layers of which the same is are alike."""
        lists = (self.spared, *(listed for listed, _ in self.rules if listed is not None))
        return tuple(listed.of_layer(layer) for listed in lists)

    @property
    def lists_none(self) -> bool:
        """Whether all modules are alike."""
        return not self.spared and all(listed is None for listed, _ in self.rules)


@dataclass(frozen=True)
class Stated:
    """A part of a config.json, read by key; errors name the key and what it says.

    Attributes:
        said: the part.
        key: its own.
        origin: what errors call the file.
    """

    said: Mapping[str, Any]
    key: str
    origin: str

    def error(self, key: str, text: str) -> ConfigError:
        """Return an error of a key."""
        return ConfigError(f"{self.origin}: {self.key}.{key} {text}")

    def part(self, key: str) -> "Stated | None":
        """Return an object inside; None where it is left out."""
        value = self.said.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, not {short(value)}.")
        return Stated(value, f"{self.key}.{key}", self.origin)

    def names(self, key: str) -> list[str]:
        """Return a list of texts; one of lists counts as one; empty where it is left out."""
        value = self.said.get(key)
        if value is None:
            return []
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.error(key, f"must be a list of modules, not {short(value)}.")
        flat = [name for each in value for name in (each if isinstance(each, list) else [each])]
        wrong = next((name for name in flat if not isinstance(name, str)), None)
        if wrong is not None:
            raise self.error(key, f"must be a list of modules' names; {short(wrong)} is none.")
        return flat

    def listed(self, key: str, names: Sequence[str]) -> Listed:
        """Return names as a list; errors are of a key."""
        try:
            return Listed(names)
        except re.error as error:
            raise self.error(key, f"has an expression that cannot be read: {error}.") from error

    def whole(self, *keys: str, among: Sequence[int] | None = None) -> int:
        """Return a whole number by the first of some keys; `among` those that are understood."""
        key = next((key for key in keys if self.said.get(key) is not None), keys[0])
        value = self.said.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be a whole number, not {short(value)}.")
        if among is not None and value not in among:
            raise self.error(key, f"is {value}; understood are {', '.join(map(str, among))}.")
        return value

    def group_size(self, *keys: str) -> int:
        """Return the weights that have a scale together; 0 for all of a row."""
        size = self.whole(*keys)
        if size == -1:
            return 0
        if not 0 < size <= 2**20:
            raise self.error(keys[0], f"is {size}; it must be -1 or a number of weights.")
        return size


def stated_beside(said: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return what QUANTIZED_BESIDE says, as a `quantization_config`.

    Raises:
        ConfigError: it says nothing of it.
    """
    found = said.get("quantization", said)
    if not isinstance(found, Mapping) or not found.get("quant_algo"):
        raise ConfigError(f"{origin}: has no 'quant_algo', in 'quantization' or by itself.")
    return dict(found)


def stated(config: Mapping[str, Any], origin: str) -> Stated | None:
    """Return what a config.json says of its quantization; None where it says nothing."""
    key = next((k for k in ("quantization_config", "compression_config") if config.get(k) is not None), None)
    if key is None:
        return None
    if not isinstance(config[key], Mapping):
        raise ConfigError(f"{origin}: {key!r} must be an object, not {short(config[key])}.")
    return Stated(config[key], key, origin)


def scheme_of(said: Stated, element_bytes: float) -> Scheme:
    """Return how modules are quantized; `element_bytes` of those that are not."""
    return Scheme(element_bytes, _spared(said), _rules(said, element_bytes))


def _spared(said: Stated) -> Listed:
    """Return the modules that are not quantized."""
    return said.listed("ignore", [name for each in SPARED for name in said.names(each)])


def layers_beyond(config: Mapping[str, Any], layers: int, origin: str) -> list[str]:
    """Return the modules that a config.json names as not quantized in layers that are not there, nor only draft."""
    said = stated(config, origin)
    if said is None or any(config.get(key) for key in config if re.search("nextn|mtp", key)):
        return []
    return [f"{said.key} ({name})" for name in _spared(said).beyond(layers)]


def precision_of(
    config: Mapping[str, Any], element_bytes: float, layers: Sequence[LayerKind], gated: bool, origin: str
) -> Precision:
    """Return the precision that a config.json states.

    Args:
        config: the config.json, with `quantization_config` or `compression_config` where it has one.
        element_bytes: of what is not quantized.
        layers: of the model, in order.
        gated: whether its MLPs have gates.
        origin: what errors call it.

    Raises:
        ConfigError: a scheme that is not understood; the key is named.
    """
    plain = Precision.of(element_bytes)
    said = stated(config, origin)
    if said is None:
        return plain
    scheme = scheme_of(said, element_bytes)
    for listed in (scheme.spared, *(listed for listed, _ in scheme.rules if listed)):
        stranger = next(listed.strangers(len(layers)), None)
        if stranger is not None:
            raise ConfigError(
                f"{origin}: {said.key!r} names the module {short(stranger)}, which is not understood."
            )
    widths: dict[str, Any] = {**_mean_bytes(scheme, layers, gated)}
    kv = _kv_bytes(said, element_bytes)
    return replace(plain, **widths, kv=kv, widened=_weights_alone(said))


def _mean_bytes(scheme: Scheme, layers: Sequence[LayerKind], gated: bool) -> dict[str, float]:
    """Return the bytes of a weight, by what it is of, over all layers that have it."""
    if scheme.lists_none:
        width = scheme.rules[0][1] if scheme.rules else scheme.plain
        return dict.fromkeys(PARTS, width)
    total, weights = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    known: dict[Hashable, float] = {}
    for index, layer in enumerate(layers):
        beside, alike = bool(layer.experts and layer.mlp_parameters), scheme.of_layer(index)
        for kind, projections in projections_of(layer, gated).items():
            for projection, share in projections:
                asked = (kind, projection, beside, alike)
                if asked not in known:
                    known[asked] = scheme.bytes_of(index, names_of(kind, projection, beside))
                total[kind] += share * known[asked]
                weights[kind] += share
    return {kind: total[kind] / weights[kind] if weights[kind] else scheme.plain for kind in PARTS}


def _rules(said: Stated, plain: float) -> tuple[tuple[Listed | None, float], ...]:
    """Return which modules have weights of how many bytes."""
    sparsity = said.part("sparsity_config")
    if sparsity is not None and sparsity.said and sparsity.said.get("format") != "dense":
        raise said.error("sparsity_config", "is not understood: weights that are left out take no bytes.")
    by_layer = said.part("quantized_layers")
    if by_layer is not None and by_layer.said:
        return tuple(_by_module(by_layer))
    groups = said.part("config_groups")
    if groups is not None and groups.said:
        return tuple(_by_group(groups))
    method = str(said.said.get("quant_method") or "").lower()
    if method == "compressed-tensors":  # the KV cache alone
        return ()
    algorithm = str(said.said.get("quant_algo") or "").lower()
    if method in GROUPED:
        return tuple(_grouped_rules(said, plain))
    for name in (algorithm, method):
        if (width := METHODS.get(name.removeprefix("w4a16_"))) is not None:
            # Of gpt-oss, only the experts are.
            return ((Listed(["experts"]) if "mxfp4" in name else None, width),)
    stated = "quant_algo" if algorithm else "quant_method"
    raise said.error(
        stated,
        f"is {short(said.said.get(stated))}, which is not understood; known are fp8, nvfp4, mxfp4, mxfp8, awq, gptq, "
        "auto-round and compressed-tensors with config_groups.",
    )


def _weights_alone(said: Stated) -> bool:
    """Return whether weights are quantized and what they are multiplied with is not."""
    groups = said.part("config_groups")
    if groups is not None and groups.said:
        inputs = [each.said.get("input_activations") for name in groups.said if (each := groups.part(name))]
        return not any(inputs)
    algorithm = str(said.said.get("quant_algo") or "").lower()
    return algorithm.startswith("w4a16_") or str(said.said.get("quant_method") or "").lower() in GROUPED


Rule = tuple[Listed | None, float]


def _grouped_rules(said: Stated, plain: float) -> list[Rule]:
    """Return the rules of AWQ, GPTQ and AutoRound, with what each says of single modules."""
    rules: list[Rule] = []
    for key in ("dynamic", "extra_config"):
        overrides = said.part(key)
        for name in overrides.said if overrides else ():
            own = overrides.part(name) if overrides else None
            pattern = name.removeprefix("+:").removeprefix("-:")
            is_pattern = key == "dynamic" or re.search(r"[*^$(\\\[]", pattern)
            listed = said.listed(key, [f"re:{pattern}" if is_pattern else pattern])
            if name.startswith("-:") or own is None:
                width = plain
            else:
                merged = replace(own, said={**said.said, **own.said})
                width = plain if own.said.get("bits", 0) == 16 else _grouped_bytes(merged)
            rules.append((listed, width))
    alone = said.names("modules_in_block_to_quantize")
    last = said.listed("modules_in_block_to_quantize", alone) if alone else None
    return [*rules, (last, _grouped_bytes(said))]


def _grouped_bytes(said: Stated) -> float:
    # Of the others vLLM serves 4 and 8 alone (TYPE_MAP of its AutoAWQConfig and AutoGPTQConfig).
    widths = (2, 3, 4, 8) if said.said.get("quant_method") in ROUNDED else (4, 8)
    bits = said.whole("bits", "w_bit", among=widths)
    size = said.group_size("group_size", "q_group_size")
    return bits / 8 + ((2 + bits / 8) / size if size else 0.0)


def _by_group(groups: Stated) -> list[Rule]:
    """Return the rules of the `config_groups` of compressed-tensors and ModelOpt."""
    rules: list[Rule] = []
    for name in groups.said:
        group = groups.part(name)
        weights = group.part("weights") if group else None
        if group is None or weights is None:
            raise groups.error(name, "has no object 'weights', which says how many bits they have.")
        bits = weights.whole("num_bits", among=(4, 8))
        given = weights.said.get("group_size") is not None
        size = weights.group_size("group_size") if given else 0
        width = bits / 8 + (2 / size if size else 0.0)
        if weights.said.get("type") == "float" and bits == 4:
            width = 0.5 + 1 / (size or 16)
        targets = group.names("targets")
        others = next((t for t in targets if re.fullmatch(r"[A-Z]\w*", t) and t != "Linear"), None)
        if others is not None:
            raise group.error(
                "targets", f"names {short(others)}, which is not understood; 'Linear' and modules are."
            )
        all_of_them = not targets or "Linear" in targets
        rules.append((None if all_of_them else group.listed("targets", targets), width))
    # What names modules counts before what names all.
    rules.sort(key=lambda rule: rule[0] is None)
    if sum(listed is None for listed, _ in rules) > 1 and len({width for _, width in rules}) > 1:
        raise ConfigError(
            f"{groups.origin}: {groups.key} has weights of several widths, and says not which layers have which."
        )
    return rules


def _by_module(by_layer: Stated) -> list[Rule]:
    """Return the rules where each quantized module is listed with its own algorithm."""
    found: dict[str, list[str]] = {}
    for module in by_layer.said:
        how = by_layer.part(module)
        assert how is not None or by_layer.said[module] is None, "only what is left out is None"
        algorithm = str(how.said.get("quant_algo") if how else None).lower()
        if algorithm.removeprefix("w4a16_") not in METHODS:
            raise by_layer.error(
                module, f"has the quant_algo {short(algorithm)}; known are {', '.join(METHODS)}."
            )
        found.setdefault(algorithm, []).append(re.sub(r"experts\.\d+", "experts.0", module))
    return [(Listed(names), METHODS[name.removeprefix("w4a16_")]) for name, names in found.items()]


def _kv_bytes(said: Stated, element_bytes: float) -> float:
    """Return the bytes of an element of the KV cache."""
    for key in ("kv_cache_quant_algo", "kv_cache_quant_method", "kv_cache_scheme"):
        value = said.said.get(key)
        if value is None or value in ("", "none", "auto"):
            continue
        if isinstance(value, Mapping):
            if value.get("num_bits") == 8 and value.get("type", "float") == "float":
                return 1.0
        elif (width := KV_BYTES.get(str(value).lower())) is not None:
            return width
        raise said.error(key, f"is {short(value)}, which is not understood; known are {', '.join(KV_BYTES)}.")
    return element_bytes
