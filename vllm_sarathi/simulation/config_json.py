"""A model's layers out of its config.json, by the names that its keys have in transformers.

Every key that says something of the shape must be understood: one that is not is an error that names it, so that
no model is ever taken for a plain dense one because it hides what it is. `config_reader` sees to that, and `families`
to what is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from vllm_sarathi.core.errors import nearest_hint, short
from vllm_sarathi.simulation.config_experts import read_experts, sparse_layers
from vllm_sarathi.simulation.config_reader import MOST, Reader
from vllm_sarathi.simulation.config_searched import rounded_up, searched_layer
from vllm_sarathi.simulation.config_states import element_bytes, read_state
from vllm_sarathi.simulation.layers import (
    Attention,
    LayerKind,
    State,
    grouped_attention,
    latent_attention,
)

MOST_LAYERS = 1024

ACTIVATIONS = frozenset(
    (
        *("silu", "swish", "swiglu", "swigluoai", "geglu", "gelu", "gelu_new", "gelu_fast", "gelu_tanh"),
        *("gelu_pytorch_tanh", "relu", "relu2", "situ", "xielu"),
    )
)


def read_layers(read: Reader) -> list[LayerKind]:
    """Return the layers that a config.json describes, in order.

    Raises:
        ConfigError: a key that is not understood, missing, or out of range.
    """
    _check_activation(read)
    blocks = _block_names(read)
    layers = len(blocks) if blocks is not None else read.number("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise read.error(
            f"{read.name('num_hidden_layers')!r} is {layers}; at most {MOST_LAYERS} are understood."
        )
    if blocks is not None:
        for key in ("num_hidden_layers", "intermediate_size"):  # for blocks that it may not have
            read.get(key)
        return [LayerKind(1, *_block(read, name)) for name in blocks]
    if read.family.state_in == "alone":
        read.get("intermediate_size")  # that of the states, which `mamba_expand` says as well
        return layers * [LayerKind(1, None, read_state(read, element_bytes(read)))]
    if read.get("block_configs") is not None:
        return [searched_layer(read, number) for number in range(layers)]
    mixers, sparse = _mixers(read, layers), sparse_layers(read, layers)
    experts = read_experts(read) if any(sparse) else None
    beside = read.flag("enable_moe_block")
    # Where all layers have experts, a width is stated by some and used by none.
    dense = dense_mlp(read) if beside or not all(sparse) or read.get("intermediate_size") else 0
    also = dense if beside else 0
    return [
        LayerKind(1, *mixer, experts, also) if is_sparse else LayerKind(1, *mixer, None, dense)
        for mixer, is_sparse in zip(mixers, sparse, strict=True)
    ]


Mixer = tuple[Attention | None, State | None]


def grouped(layers: Iterable[LayerKind]) -> tuple[LayerKind, ...]:
    """Return layers, those that are alike together."""
    return tuple(replace(layer, count=count) for layer, count in Counter(layers).items())


def _attention(read: Reader, local: bool = False) -> Attention:
    """Return the attention of a layer; `local` for one that looks back a window alone."""
    hidden, heads = read.number("hidden_size"), read.number("num_attention_heads")
    # Without a latent, no head has a part of keys that is not rotated.
    if read.number("kv_lora_rank", default=0) or read.number("qk_nope_head_dim", default=0):
        return _latent(read, hidden, heads)
    if not read.config.get("head_dim") and not read.config.get("attention_head_dim") and hidden % heads:
        raise read.error(
            f"{read.name('hidden_size')!r} is {hidden}, which {heads} heads do not divide evenly."
        )
    kv_heads = _kv_heads(read, heads)
    head_dim = read.number("head_dim", "attention_head_dim", default=hidden // heads)
    value_dim = read.number("v_head_dim", default=head_dim)
    window = None
    if local:
        window = read.number("sliding_window", "sliding_window_size", "attention_chunk_size")
        heads = read.number("swa_num_attention_heads", default=heads)
        kv_heads = read.number("swa_num_key_value_heads", default=kv_heads)
        head_dim = read.number("swa_head_dim", default=head_dim)
        value_dim = read.number("swa_v_head_dim", default=value_dim)
    else:
        kv_heads = read.number("num_global_key_value_heads", default=kv_heads)
        if read.number("global_head_dim", default=0):
            head_dim = value_dim = read.number("global_head_dim")
    if heads % kv_heads:
        raise read.error(
            f"{read.name('num_key_value_heads')!r} is {kv_heads}, which must divide the {heads} heads evenly."
        )
    gates = (read.flag("attn_output_gate"), read.flag("attention_output_gate"))
    return grouped_attention(
        hidden,
        heads,
        kv_heads,
        head_dim,
        value_dim=value_dim,
        window=window,
        gated=any(gates),
        keys_are_values=read.flag("attention_k_eq_v") and not local,
    )


def read_indexer(read: Reader) -> tuple[int, int] | None:
    """Return the heads, and their dimension, of what chooses the tokens that a layer attends to; None without."""
    if not read.number("index_n_heads", default=0):
        return None
    return read.number("index_n_heads"), read.number("index_head_dim")


def _latent(read: Reader, hidden: int, heads: int) -> Attention:
    """Return the latent attention of a layer; its keys have no heads of their own, whatever the file says."""
    for key in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        read.get(key)
    indexer = read_indexer(read)
    return latent_attention(
        hidden,
        heads,
        read.number("q_lora_rank", default=0),
        read.number("kv_lora_rank"),
        read.number("qk_nope_head_dim"),
        read.number("qk_rope_head_dim"),
        read.number("v_head_dim"),
        indexer,
        read.number("index_topk") if indexer else None,
    )


def _kv_heads(read: Reader, heads: int) -> int:
    """Return how many heads of keys a layer has."""
    # Falcon's first models state as many as heads, and share one.
    if read.flag("multi_query") and not read.flag("new_decoder_architecture"):
        read.number("num_key_value_heads", "num_kv_heads", default=1)
        return 1
    own = heads if read.family.own_heads or not read.flag("multi_query_attention", True) else None
    return read.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=own)


def _mixers(read: Reader, layers: int) -> list[Mixer]:
    """Return what mixes tokens in each layer."""
    if any(entry != "1" for entry in read.names("attn_type_list", layers) or ()):
        raise read.error("'attn_type_list' has layers of lightning attention, which is not understood.")
    for key in LAYOUT:
        read.get(key)
    kinds = read.names("layer_types", layers) or _implied_kinds(read, layers)
    made: dict[str, Mixer] = {}
    for kind in set(kinds):
        if kind in WHOLE_ATTENTION:
            made[kind] = (_attention(read), None)
        elif kind in ("sliding_attention", "chunked_attention"):
            made[kind] = (_attention(read, local=True), None)
        elif kind in ("linear_attention", "mamba", "conv"):
            made[kind] = (None, read_state(read, element_bytes(read)))
        elif kind == "hybrid":
            made[kind] = (_attention(read), read_state(read, element_bytes(read)))
        else:
            raise read.error(f"'layer_types' has {short(kind)}, which is not understood.")
    return [made[kind] for kind in kinds]


WHOLE_ATTENTION = (
    "full_attention",
    "attention",
    "deepseek_sparse_attention",
    "indexed_attention",
    "minimax_m3_sparse",
)
"""Kinds of layers that keep all tokens, whichever they choose to attend to."""

LAYOUT = (
    "_sliding_window_pattern",
    "attention_chunk_size",
    "full_attention_interval",
    "hybrid_layer_pattern",
    "max_window_layers",
    "sliding_window",
    "sliding_window_pattern",
    "sliding_window_size",
    "use_sliding_window",
)
"""Keys of which layer attends to what: `layer_types` says it all where it stands."""


def _implied_kinds(read: Reader, layers: int) -> list[str]:
    if read.family.state:
        return _kinds_with_states(read, layers)
    pattern = read.names("hybrid_layer_pattern", layers)
    if pattern is not None:
        return ["sliding_attention" if entry == "1" else "full_attention" for entry in pattern]
    if read.number("attention_chunk_size", default=0) and read.number("interleave_moe_layer_step", default=0):
        # Llama 4: every fourth layer has no positions, and looks at all.
        return ["chunked_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    window = read.number("sliding_window", "sliding_window_size", default=0)
    seen = read.number("max_window_layers", default=0)
    windowed = _windowed(read, layers, seen)
    longest = read.number("max_position_embeddings")
    return ["sliding_attention" if 0 < window < longest and yes else "full_attention" for yes in windowed]


def _kinds_with_states(read: Reader, layers: int) -> list[str]:
    """Return which layers have attention, in a family in which others keep a state."""
    if read.family.state_in == "all":
        return ["hybrid"] * layers
    first = 0
    attending = read.names("full_attn_idxs")  # LFM2
    if attending is None:
        first, attending = 1, read.names("full_attn_layers")  # Kimi Linear, which counts them from 1
        read.get("kda_layers")
    if attending is not None:
        return [
            "full_attention" if str(i + first) in attending else "linear_attention" for i in range(layers)
        ]
    every = read.number("full_attention_interval", "attn_layer_period", default=0)
    if not every:
        raise read.error("does not say which of its layers have attention: 'layer_types' would.")
    offset = read.number("attn_layer_offset", default=every - 1, least=0)
    return ["full_attention" if i % every == offset else "linear_attention" for i in range(layers)]


def _windowed(read: Reader, layers: int, before: int) -> list[bool]:
    """Return which layers have the window, where one is stated; `before` is the first with `use_sliding_window`."""
    stated = read.get("use_sliding_window") is not None
    if not read.flag("use_sliding_window", True):
        return [False] * layers
    pattern = read.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and not set(pattern) - {"L", "G"}:  # as EXAONE 4 has it
        return [pattern[i % len(pattern)] == "L" for i in range(layers)]
    full_every = read.number("sliding_window_pattern", default=0)
    if full_every > 1:
        return [bool((i + 1) % full_every) for i in range(layers)]
    if not stated:
        return [True] * layers
    if 0 < before < layers:
        raise read.error(
            f"'max_window_layers' is {before} of {layers} layers: vLLM serves such a model with a window in all of its "
            "layers or in none."
        )
    return [not before] * layers


def _check_activation(read: Reader) -> None:
    """Raise ConfigError for an activation that is not understood."""
    for key in ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "activation"):
        said = read.get(key)
        if said is not None and (not isinstance(said, str) or said not in ACTIVATIONS):
            raise read.error(
                f"{key!r} is {short(said)}, which is not understood; {nearest_hint(str(said), sorted(ACTIVATIONS))}"
            )


def dense_mlp(read: Reader) -> int:
    """Return the weights of a dense MLP."""
    hidden = read.number("hidden_size")
    return read.family.matrices * hidden * dense_width(read)


def dense_width(read: Reader) -> int:
    """Return the width of a dense MLP: four times the model's where an MLP without a gate states none."""
    widest = None if read.family.gated else 4 * read.number("hidden_size")
    own = read.number(
        "dense_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", default=0
    )
    read.get("intermediate_size")  # where a key of its own says the width, this one is that of the experts
    width = own or read.number("intermediate_size", "ffn_hidden_size", default=widest)
    multiple, factor = read.number("block_multiple_of", default=1), read.get("block_ffn_dim_multiplier")
    if factor is not None and (
        isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= MOST
    ):
        raise read.error(f"'block_ffn_dim_multiplier' must be a number above 0, not {short(factor)}.")
    if read.flag("block_auto_adjust_ff_dim"):  # LFM2
        width = rounded_up(int((1.0 if factor is None else factor) * int(2 * width / 3)), multiple)
    return width


def _block_names(read: Reader) -> list[str] | None:
    """Return the blocks of a model whose layers are one thing each (Nemotron-H)."""
    pattern = read.get("hybrid_override_pattern")
    names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if pattern:
        if not isinstance(pattern, str):
            raise read.error(f"'hybrid_override_pattern' must be a text, not {short(pattern)}.")
        unknown = sorted(set(pattern) - set(names))
        if unknown:
            raise read.error(f"'hybrid_override_pattern' has {short(unknown[0])}, which is not understood.")
        return [names[letter] for letter in pattern]
    return read.names("layers_block_type")


def _block(read: Reader, name: str) -> tuple[Any, ...]:
    # transformers 5 calls some of them otherwise.
    name = {"linear_attention": "mamba", "full_attention": "attention"}.get(name, name)
    makers: dict[str, Callable[[], tuple[Any, ...]]] = {
        "mamba": lambda: (None, read_state(read, element_bytes(read)), None, 0),
        "attention": lambda: (_attention(read), None, None, 0),
        "mlp": lambda: (None, None, None, dense_mlp(read)),
        "moe": lambda: (None, None, read_experts(read), 0),
    }
    if name not in makers:
        raise read.error(f"'layers_block_type' has {short(name)}, which is not understood.")
    return makers[name]()


def is_tied(read: Reader) -> bool:
    """Return whether one matrix is input and output embedding.

    Raises:
        ConfigError: it is not said, and the family has no default.
    """
    if read.config.get("tie_word_embeddings") is None and read.family.tied is None:
        raise read.error(
            "has no 'tie_word_embeddings', true or false; the configuration class of its family is not known here."
        )
    return read.flag("tie_word_embeddings", bool(read.family.tied))
