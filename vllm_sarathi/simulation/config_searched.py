"""Models whose layers a search has made, each its own (Llama-Nemotron, arXiv 2505.00949), out of a config.json."""

from collections.abc import Mapping
from typing import Any

from vllm_sarathi.core.errors import short
from vllm_sarathi.simulation.config_reader import Reader
from vllm_sarathi.simulation.layers import LayerKind, grouped_attention


def rounded_up(number: int, multiple: int) -> int:
    """Return the first multiple that is not below a number."""
    return -(-number // multiple) * multiple


def searched_layer(read: Reader, number: int) -> LayerKind:
    """Return one layer.

    Args:
        read: the config.json.
        number: of the layer, from 0.

    Raises:
        ConfigError: something of it is not understood.
    """
    configs = read.get("block_configs")
    if not isinstance(configs, list) or number >= len(configs) or not isinstance(configs[number], Mapping):
        raise read.error("'block_configs' must be a list of an object for each layer.")
    parts = []
    for key in ("attention", "ffn"):
        part = configs[number].get(key)
        if not isinstance(part, Mapping) or part.get("replace_with_linear"):
            raise read.error(f"'block_configs' has a layer whose {key!r} is not understood: {short(part)}.")
        parts.append(part)
    attention, mlp = parts
    hidden, heads = read.number("hidden_size"), read.number("num_attention_heads")
    for key in ("num_key_value_heads", "intermediate_size"):  # what the layers say counts
        read.get(key)
    made = None
    width: Any = 0
    if not attention.get("no_op"):
        group = attention.get("n_heads_in_group")
        if not isinstance(group, int) or not 0 < group <= heads or heads % group:
            raise read.error(f"'block_configs' has 'n_heads_in_group' {short(group)}, of {heads} heads.")
        dim = read.number("head_dim", default=hidden // heads)
        made = grouped_attention(hidden, heads, heads // group, dim)
    if not mlp.get("no_op"):
        factor, width = mlp.get("ffn_mult"), mlp.get("intermediate_size")
        if isinstance(factor, int | float):
            width = rounded_up(int(2 * factor * hidden / 3), 256)
        if not isinstance(width, int) or width < 1:
            raise read.error(f"'block_configs' has an 'ffn' without a width: {short(mlp)}.")
    return LayerKind(1, made, None, None, read.family.matrices * hidden * width)
