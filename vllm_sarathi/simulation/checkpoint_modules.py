"""The modules of a checkpoint, by what they are called, and the lists that name some of them.

A `quantization_config` says by name which modules are quantized how: whole names, parts of names (`self_attn`), globs,
and expressions after `re:`. A layer's modules have different names in different families; a list is looked up by all
of them.
"""

import fnmatch
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache

from vllm_sarathi.simulation.layers import LayerKind

PARTS = {
    "attention": ("self_attn", "mixer", "attention", "self_attention", "attn"),
    "state": ("linear_attn", "mixer", "mamba", "conv", "self_attn"),
    "mlp": ("mlp", "mixer", "feed_forward", "shared_mlp"),
    "shared": (
        "shared_mlp",
        "mlp.shared_experts",
        "mlp.shared_expert",
        "block_sparse_moe.shared_experts",
        "mixer.shared_experts",
        "feed_forward.shared_expert",
        "share_expert",
    ),
    "experts": (
        "mlp.experts",
        "block_sparse_moe.experts",
        "mixer.experts",
        "feed_forward.experts",
        "experts",
    ),
}
"""Where projections are inside a layer, by what they are of."""

ALSO = {
    "q_proj": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    "k_proj": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    "v_proj": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    "o_proj": ("out_proj", "dense", "c_proj", "wo"),
    "q_a_proj": ("fused_qkv_a_proj",),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj",),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj"),
    "in_proj_ba": ("in_proj_a", "in_proj_b", "in_proj"),
    "gate_proj": ("gate_up_proj", "w1", "input_linear"),
    "up_proj": ("gate_up_proj", "w3", "input_linear", "c_fc", "dense_h_to_4h", "fc1", "fc_in"),
    "down_proj": ("w2", "output_linear", "c_proj", "dense_4h_to_h", "fc2", "fc_out"),
}
"""What else projections are called, some of them together."""

LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?")
"""A module's name that begins with that of its layer."""

SMALL = re.compile(
    r"norm|gate$|gate\.|router|conv|bias|scale|index|rotary|eh_proj|shared_head|embed|[A-Z]_log|dt_|\bD$|score|_gate"
)
"""Modules whose weights are too few to count, or that are of layers that only draft."""


class Listed:
    """Names of modules, as a list in a checkpoint has them.

    Args:
        entries: whole names, parts of them, globs, or expressions after `re:`.

    Raises:
        re.error: an expression that is none.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        own: dict[int, set[str]] = {}
        own_patterns: dict[int, list[str]] = {}
        short, general = set(), []
        for entry in entries:
            if entry.startswith("re:"):
                # What comes before the layers has other names in other files.
                general.append(re.sub(r"^[^()|]*?(?=layers(?:\\\.|\.|\[))", "(?:.*)", entry[3:]))
                continue
            found = LAYER.fullmatch(entry)
            name = (found[2] or "") if found else ""
            is_glob = any(sign in entry for sign in "*?[")
            if found and not is_glob:
                own.setdefault(int(found[1]), set()).add(name)
            elif found and name:
                own_patterns.setdefault(int(found[1]), []).append(fnmatch.translate(name))
            elif is_glob:
                general.append(fnmatch.translate(re.sub(r"^.*?(?=\blayers\.)", "", entry)))
            else:
                short.add(entry)
        self._short = frozenset(short)
        self._own = {layer: frozenset(names) for layer, names in own.items()}
        self._own_patterns = {layer: _any_of(texts) for layer, texts in own_patterns.items()}
        self._general = _any_of(general) if general else None
        self._by_number = self._general is not None and "layers" in self._general.pattern

    def __bool__(self) -> bool:
        return bool(self._short or self._own or self._own_patterns or self._general)

    def of_layer(self, layer: int) -> Hashable:
        """Return what is listed of a layer: layers of which the same is are alike."""
        number = layer if self._by_number else None
        return self._own.get(layer), self._own_patterns.get(layer), number

    def has(self, layer: int, name: str) -> bool:
        """Return whether a module of a layer is listed, by its name inside of the layer."""
        own = self._own.get(layer, frozenset())
        listed = own | self._short
        if listed:
            parts = name.split(".")
            runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
            if "" in own or any(run in listed for run in runs):
                return True
        pattern = self._own_patterns.get(layer)
        if pattern is not None and pattern.match(name):
            return True
        if self._general is None:
            return False
        whole = f"layers.{layer}.{name}"
        return any(self._general.match(f"{before}{whole}") for before in ("", "model."))

    def strangers(self, layers: int) -> Iterator[str]:
        """Yield the listed modules of a layer that are none of those known here, and too large to leave out."""
        for layer, names in sorted(self._own.items()):
            for name in sorted(names) if layer < layers else ():
                plain = re.sub(r"experts\.\d+", "experts.0", name)
                if plain and plain not in _known() and not SMALL.search(plain):
                    yield f"layers.{layer}.{name}"

    def beyond(self, layers: int) -> Iterator[str]:
        """Yield the listed modules of layers that a model of this many has not."""
        for layer, names in sorted(self._own.items()):
            if layer >= layers:
                yield from (f"layers.{layer}.{name}".rstrip(".") for name in sorted(names))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{text})" for text in patterns))


def names_of(kind: str, projection: str, beside_mlp: bool) -> tuple[str, ...]:
    """Return what a projection may be called inside of a layer.

    Args:
        kind: one of PARTS.
        projection: its usual name.
        beside_mlp: whether the layer has a dense MLP beside its experts, which then are no part of it.
    """
    names = []
    for part in PARTS[kind]:
        if kind == "experts" and beside_mlp and part.startswith("mlp."):
            continue
        for called in (projection, *ALSO.get(projection, ())):
            names.append(f"{part}.{called}")
            if kind == "experts":
                names.append(f"{part}.0.{called}")
    return tuple(names)


def projections_of(layer: LayerKind, gated: bool) -> Mapping[str, tuple[tuple[str, int], ...]]:
    """Return a layer's projections with their share of the weights, by what they are of."""
    mlp = (
        (("gate_proj", 1), ("up_proj", 1), ("down_proj", 1)) if gated else (("up_proj", 1), ("down_proj", 1))
    )
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    if layer.attention:
        found["attention"] = layer.attention.projections
    if layer.state:
        found["state"] = layer.state.projections
    if layer.mlp_parameters:
        found["mlp"] = mlp
    if layer.experts:
        found |= {"experts": mlp, "shared": mlp}
    return found


@cache
def _known() -> frozenset[str]:
    """Return all names and parts of names that modules here may have inside of a layer."""
    attention = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    )
    state = ("in_proj_qkvz", "in_proj_z", "in_proj_ba", "out_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    found = set()
    for kind in PARTS:
        for projection in {"attention": attention, "state": state}.get(kind, mlp):
            for name in names_of(kind, projection, beside_mlp=False):
                parts = name.split(".")
                found |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return frozenset(found)
