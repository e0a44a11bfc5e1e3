"""Families with layers as no others have them, out of a config.json: Zamba 2, Gemma 3n and 4, MiniMax-M3, DeepSeek-V4.

What they compute is taken from their classes in transformers, and what they keep from vLLM's.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from vllm_sarathi.core.errors import short
from vllm_sarathi.simulation.config_experts import read_experts
from vllm_sarathi.simulation.config_json import dense_mlp, read_indexer, read_layers
from vllm_sarathi.simulation.config_reader import Reader
from vllm_sarathi.simulation.config_states import element_bytes, read_state
from vllm_sarathi.simulation.layers import Attention, LayerKind, index_attention
from vllm_sarathi.simulation.quantization import MXFP4_BYTES, Precision


def layers_of(read: Reader) -> list[LayerKind]:
    """Return the layers that a config.json describes, in order; `config_json.read_layers` says what it raises."""
    return MAKERS.get(read.config["model_type"], _usual)(read)


def layer_inputs(read: Reader, layers: int) -> int:
    """Return the weights of an embedding that gives each layer an input of its own, as Gemma 3n has it."""
    if MAKERS.get(read.config["model_type"]) is not _gemma or not _has_layer_inputs(read):
        return 0
    vocab = read.number("vocab_size_per_layer_input", default=read.number("vocab_size"))
    return vocab * layers * read.number("hidden_size_per_layer_input")


def with_own_experts(read: Reader, precision: Precision) -> Precision:
    """Return a precision with that of the experts of DeepSeek-V4, which stands in a key of its own.

    Raises:
        ConfigError: the key says what is not understood.
    """
    if read.config["model_type"] != "deepseek_v4" or precision.experts != 1.0:
        return precision
    said = read.get("expert_dtype") or "fp4"
    if said not in ("fp4", "fp8"):
        raise read.error(f"'expert_dtype' is {short(said)}; known are fp4 and fp8.")
    return replace(precision, experts=MXFP4_BYTES) if said == "fp4" else precision


def _usual(read: Reader) -> list[LayerKind]:
    layers = read_layers(read)
    indexer = read_indexer(read)
    if indexer is None:
        return layers
    # What DeepSeek-V3.2 chooses tokens with.
    more = (index_attention(*indexer),)
    return [
        replace(layer, more=more) if layer.attention and layer.attention.reach else layer for layer in layers
    ]


def _gemma(read: Reader) -> list[LayerKind]:
    """Return the layers of Gemma 3n and 4: some read the cache of others; all may have inputs of their own."""
    layers = read_layers(_with_own_heads(read))
    hidden, count = read.number("hidden_size"), len(layers)
    for key in ("altup_active_idx", "altup_coef_clip", "altup_correct_scale", "activation_sparsity_pattern"):
        read.get(key)
    own = count - read.number("num_kv_shared_layers", default=0)
    wide = read.flag("use_double_wide_mlp")
    beside = 2 * hidden * read.number("laurel_rank", default=0)
    inputs = read.number("hidden_size_per_layer_input") if _has_layer_inputs(read) else 0
    beside += 2 * hidden * inputs
    streams = read.number("altup_num_inputs", default=0)
    beside += streams * hidden
    layers = [replace(layer, other_parameters=beside) for layer in layers]
    if 0 < own < count:
        layers[own:] = [_borrowing(layer, hidden, wide) for layer in layers[own:]]
    # What all layers have before and behind them.
    around = hidden * count * inputs + 2 * max(0, streams - 1) * hidden * hidden
    layers[0] = replace(layers[0], other_parameters=beside + around)
    return layers


def _with_own_heads(read: Reader) -> Reader:
    """Return Gemma 4 with the heads of its layers without a window in the keys that published files have for them.

    transformers 5 writes them for each of those layers.

    Raises:
        ConfigError: it says something else of a layer.
    """
    said = read.get("per_layer_config")
    if not said:
        return read
    each = list(said.values()) if isinstance(said, Mapping) else [None]
    kinds = read.names("layer_types") or []
    whole = [str(i) for i, kind in enumerate(kinds) if kind == "full_attention"]
    own = each[0]
    if (
        not isinstance(own, Mapping)
        or set(own) - {"head_dim", "num_key_value_heads"}
        or any(other != own for other in each)
        or sorted(str(key).lstrip("0") or "0" for key in said) != sorted(whole)
    ):
        raise read.error("'per_layer_config' must say the same of all layers without a window: their heads.")
    heads = {"global_head_dim": own.get("head_dim", read.config["head_dim"])}
    heads |= {"num_global_key_value_heads": own.get("num_key_value_heads")}
    return replace(read, config={**read.config, **heads})


def _has_layer_inputs(read: Reader) -> bool:
    return bool(read.number("hidden_size_per_layer_input", default=0))


def _borrowing(layer: LayerKind, hidden: int, wide: bool) -> LayerKind:
    """Return a layer without keys and values of its own; `wide` for an MLP of twice the width."""
    assert layer.attention is not None, "all of its layers have one"
    kept = tuple(entry for entry in layer.attention.projections if entry[0] not in ("k_proj", "v_proj"))
    attention = replace(
        layer.attention, projections=kept, parameters=sum(weights for _, weights in kept), stores=False
    )
    return replace(layer, attention=attention, mlp_parameters=layer.mlp_parameters * (2 if wide else 1))


def _zamba2(read: Reader) -> list[LayerKind]:
    """Return the layers of Zamba 2: Mamba, and before some of them one of a few transformers that they share."""
    for key in (
        "num_hidden_layers",
        "hybrid_layer_ids",
        "attention_hidden_size",
        "kv_channels",
        "num_query_groups",
    ):
        read.get(key)
    kinds = read.names("layers_block_type")
    unknown = next(
        (kind for kind in kinds or () if kind not in ("mamba", "linear_attention", "hybrid")), None
    )
    if kinds is None or unknown is not None:
        raise read.error(f"'layers_block_type' must be a list of 'mamba' and 'hybrid', not {short(unknown)}.")
    hidden, state = read.number("hidden_size"), read_state(read, element_bytes(read))
    rank, blocks = read.number("adapter_rank", default=128), read.number("num_mem_blocks", default=1)
    # Both kinds of adapters, and what joins the two ways, are each layer's own.
    width = read.number("intermediate_size")
    beside = hidden * hidden + rank * (hidden + 2 * width)
    if read.flag("use_shared_attention_adapter"):
        beside += 3 * rank * 4 * hidden
    layers = [LayerKind(1, None, state, other_parameters=beside if kind == "hybrid" else 0) for kind in kinds]
    shared = LayerKind(1, _wide_attention(read, hidden), mlp_parameters=dense_mlp(read))
    hybrids = kinds.count("hybrid")
    return layers + [replace(shared, borrowed=number >= blocks) for number in range(hybrids)]


def _wide_attention(read: Reader, hidden: int) -> Attention:
    """Return attention whose input is the residual stream beside the embedded token."""
    heads = read.number("num_attention_heads")
    kv_heads = read.number("num_key_value_heads", default=heads)
    head_dim = read.number("attention_head_dim", default=2 * hidden // heads)
    projections = (
        ("q_proj", 2 * hidden * heads * head_dim),
        ("k_proj", 2 * hidden * kv_heads * head_dim),
        ("v_proj", 2 * hidden * kv_heads * head_dim),
        ("o_proj", heads * head_dim * hidden),
    )
    parameters = sum(weights for _, weights in projections)
    return Attention(
        parameters, 4 * heads * head_dim, 2 * kv_heads * head_dim, kv_heads, projections=projections
    )


def _minimax_m3(read: Reader) -> list[LayerKind]:
    """Return the layers of MiniMax-M3: in some, attention to blocks that an index of one head of keys chooses."""
    layers = read_layers(read)
    hidden, count = read.number("hidden_size"), len(layers)
    for key in (
        "sparse_init_block",
        "sparse_disable_index_value",
        "index_local_blocks",
        "use_sparse_attention",
    ):
        read.get(key)
    kinds = read.names("layer_types", count)
    chosen = read.names("sparse_attention_freq", count)
    if kinds is None and chosen is None:
        return layers
    sparse = (
        [kind == "minimax_m3_sparse" for kind in kinds] if kinds else [entry == "1" for entry in chosen or ()]
    )
    heads, head_dim = read.number("index_n_heads"), read.number("index_head_dim")
    reach = read.number("index_topk_blocks") * read.number("index_block_size")
    index = index_attention(heads, head_dim, key_bytes=element_bytes(read) * head_dim)
    made = []
    for layer, chooses in zip(layers, sparse, strict=True):
        if not chooses:
            made.append(layer)
            continue
        assert layer.attention is not None, "all of its layers have one"
        projection = ("indexer", hidden * head_dim * (heads + 1))
        attention = replace(
            layer.attention,
            reach=reach,
            parameters=layer.attention.parameters + projection[1],
            projections=(*layer.attention.projections, projection),
        )
        made.append(replace(layer, attention=attention, more=(index,)))
    return made


RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
"""Tokens of which DeepSeek-V4 makes one entry of its cache, by the kind of the layer; 0 for none."""


def _deepseek_v4(read: Reader) -> list[LayerKind]:
    """Return the layers of DeepSeek-V4: a window, and beside it the tokens before in compressed entries."""
    count = read.number("num_hidden_layers")
    for key in (
        "num_key_value_heads", "compress_rope_theta", "mlp_layer_types", "num_hash_layers", "compress_rates",
        "hc_sinkhorn_iters",
    ):  # fmt: skip
        read.get(key)
    kinds, ratios = read.names("layer_types", count), read.names("compress_ratios", count)
    if kinds is None and ratios is None:
        raise read.error("has no 'compress_ratios', which say how each layer keeps its tokens.")
    unknown = next((kind for kind in kinds or () if kind not in RATIOS), None)
    unknown = unknown or next((ratio for ratio in ratios or () if ratio not in ("0", "1", "4", "128")), None)
    if unknown is not None:
        key = "layer_types" if kinds else "compress_ratios"
        raise read.error(f"{key!r} has {short(unknown)}, which is not understood.")
    each = [RATIOS[kind] for kind in kinds] if kinds else [int(ratio) for ratio in ratios or ()]
    made = {ratio: _compressed_layer(read, ratio) for ratio in set(each)}
    return [made[ratio] for ratio in each]


def _compressed_layer(read: Reader, ratio: int) -> LayerKind:
    """Return a layer of DeepSeek-V4 that makes one entry of its cache of `ratio` tokens."""
    hidden, heads, dim = (
        read.number("hidden_size"),
        read.number("num_attention_heads"),
        read.number("head_dim"),
    )
    rank, groups, inner = read.number("q_lora_rank"), read.number("o_groups"), read.number("o_lora_rank")
    rope_dim = read.number("qk_rope_head_dim", default=64)
    projections = [
        ("q_a_proj", hidden * rank),
        ("q_b_proj", rank * heads * dim),
        ("kv_a_proj_with_mqa", hidden * dim),
        ("o_proj", heads * dim * inner + groups * inner * hidden),
    ]
    # Of its residual streams, the parts of an attention and of an MLP.
    streams = read.number("hc_mult")
    other = 2 * streams * (2 + streams) * streams * hidden
    # vLLM's layout: in FP8, but for the numbers with positions; a scale for each 64, and one more byte.
    pair_flops, kept = 4 * heads * dim, float(dim + rope_dim + (dim - rope_dim) // 64 + 1)
    more: list[Attention] = []
    if ratio > 1:
        pairs = 2 if ratio == RATIOS["compressed_sparse_attention"] else 1
        indexer = read_indexer(read)
        sizes = [dim]
        reach = None
        if pairs == 2:
            if indexer is None:
                raise read.error("has no whole number 'index_n_heads', which its family's config.json has.")
            projections.append(("indexer", rank * indexer[0] * indexer[1]))
            other += hidden * indexer[0]
            sizes.append(indexer[1])
            reach = read.number("index_topk") * ratio
            more.append(index_attention(*indexer, stride=ratio))
        more.append(Attention(0, pair_flops / ratio, 0, 1, kv_bytes=kept / ratio, reach=reach))
        # The tokens of which the next entry is made wait in 32 bits; each step writes one of them.
        waiting = sum(4 * 2 * pairs * size for size in sizes)
        more.append(Attention(0, 0, 0, 1, window=pairs * ratio, kv_bytes=waiting, reach=1))
        other += sum(2 * pairs * hidden * size for size in sizes)
    window = Attention(
        sum(weights for _, weights in projections),
        pair_flops,
        0,
        1,
        read.number("sliding_window"),
        tuple(projections),
        kv_bytes=kept,
    )
    return LayerKind(1, window, None, read_experts(read), more=tuple(more), other_parameters=other)


MAKERS: Mapping[str, Callable[[Reader], list[LayerKind]]] = {
    "zamba2": _zamba2,
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _gemma),
    **dict.fromkeys(("minimax_m3", "minimax_m3_text", "minimax_m3_vl_text"), _minimax_m3),
    "deepseek_v4": _deepseek_v4,
}
"""By `model_type`."""
