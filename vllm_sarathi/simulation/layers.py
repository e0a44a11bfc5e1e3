"""The layers of a decoder in numbers: weights, what they keep of each token, what they keep of each sequence.

Notation of the formulas: h is the width of the residual stream, heads and dimensions are those of config.json.
Norms, biases and convolutions of a few taps are below 0.1% of a model and left out, as are encoders of images and the
layers that only draft tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer.

    Attributes:
        parameters: weights of its projections.
        pair_flops: operations for each pair of a token with one that it attends to.
        kv_elements: numbers in the KV cache for each token.
        kv_heads: over how many devices they can be spread; beyond, and for a latent (1), each has a copy.
        window: tokens that it looks back, and keeps; None for all.
        projections: weights of each, by its usual name.
        kv_bytes: bytes in the KV cache for each token whatever its precision: of what always has one of its own.
        reach: tokens of which it reads the keys and values, where it chooses some of those that it keeps; None for all.
        stores: whether it keeps keys and values of its own; else it reads those of another layer.
    """

    parameters: int
    pair_flops: float
    kv_elements: int
    kv_heads: int
    window: int | None = None
    projections: tuple[tuple[str, int], ...] = ()
    kv_bytes: float = 0.0
    reach: int | None = None
    stores: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """A linear attention or Mamba: what a layer keeps of a sequence, however long.

    Attributes:
        parameters: weights of its projections.
        state_bytes: for each sequence.
        projections: weights of each, by its usual name.
    """

    parameters: int
    state_bytes: int
    projections: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: experts.
        active: of which each token uses this number.
        parameters: weights of one.
        shared_parameters: weights that every token goes through, the router's among them.
        width, shared_width: of one, and of all that every token goes through.
    """

    count: int
    active: int
    parameters: int
    shared_parameters: int
    width: int = 0
    shared_width: int = 0

    def chances(self, skew: float = 0.0) -> tuple[float, ...]:
        """Return for each expert how likely a token uses it, the most likely first.

        Args:
            skew: exponent of the power law that the loads of the experts follow; 0 for even loads.
        """
        weights = [float(rank**-skew) for rank in range(1, self.count + 1)]
        each = self.active / sum(weights)
        return tuple(min(1.0, each * weight) for weight in weights)

    def touched(self, tokens: float, skew: float = 0.0, devices: int = 1) -> float:
        """Return how many experts some tokens wake, on average.

        Args:
            tokens: in the step.
            skew: as in `chances`.
            devices: that whole experts are dealt out to in turn; what the busiest has counts for all of them.
        """
        count = max(1.0, tokens)
        return float(devices * sum(1 - (1 - chance) ** count for chance in self.chances(skew)[::devices]))

    def busiest(self, skew: float, devices: int) -> float:
        """Return the load of the busiest device over the mean; the arguments are those of `touched`."""
        chances = self.chances(skew)
        return devices * sum(chances[::devices]) / sum(chances)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that are alike.

    Attributes:
        count: how many.
        attention, state, experts: what they have; None for what they have not.
        mlp_parameters: weights of a dense MLP.
        more: what else they attend to; its weights are those of `attention`.
        other_parameters: weights of other products, which are not quantized.
        borrowed: whether their weights are those of other layers.
    """

    count: int
    attention: Attention | None = None
    state: State | None = None
    experts: Experts | None = None
    mlp_parameters: int = 0
    more: tuple[Attention, ...] = ()
    other_parameters: int = 0
    borrowed: bool = False

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """All that they attend to."""
        return (self.attention, *self.more) if self.attention else self.more


def grouped_attention(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    window: int | None = None,
    gated: bool = False,
    keys_are_values: bool = False,
) -> Attention:
    """Return attention in which groups of heads share their keys and values.

    Args:
        hidden, heads, kv_heads, head_dim: of the layer.
        value_dim: of a value's head; None for that of a key.
        window: tokens that it looks back.
        gated: whether the output has a gate, projected beside the queries.
        keys_are_values: whether one projection gives both (each is cached all the same).
    """
    value = value_dim or head_dim
    projections = (
        ("q_proj", hidden * heads * head_dim * (2 if gated else 1)),
        ("k_proj", hidden * kv_heads * head_dim),
        ("v_proj", 0 if keys_are_values else hidden * kv_heads * value),
        ("o_proj", hidden * heads * value),
    )
    return Attention(
        parameters=sum(weights for _, weights in projections),
        pair_flops=2 * heads * (head_dim + value),
        kv_elements=kv_heads * (head_dim + value),
        kv_heads=kv_heads,
        window=window,
        projections=projections,
    )


def latent_attention(
    hidden: int,
    heads: int,
    query_rank: int,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    indexer: tuple[int, int] | None = None,
    reach: int | None = None,
) -> Attention:
    """Return latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        hidden, heads: of the layer.
        query_rank, kv_rank: of the compressed queries (0 for none) and of the cached latent.
        nope_dim, rope_dim, value_dim: of a head.
        indexer: heads and their dimension of what chooses tokens to attend to; None without.
        reach: how many it chooses.
    """
    query_dim = nope_dim + rope_dim
    queries = heads * query_dim * (query_rank or hidden)
    projections = [
        *(
            (("q_a_proj", hidden * query_rank), ("q_b_proj", queries))
            if query_rank
            else (("q_proj", queries),)
        ),
        ("kv_a_proj_with_mqa", hidden * (kv_rank + rope_dim)),
        ("kv_b_proj", kv_rank * heads * (nope_dim + value_dim)),
        ("o_proj", heads * value_dim * hidden),
    ]
    if indexer is not None:
        index_heads, index_dim = indexer
        chooser = (query_rank or hidden) * index_heads * index_dim + hidden * (index_dim + index_heads)
        projections.append(("indexer", chooser))
    return Attention(
        parameters=sum(weights for _, weights in projections),
        pair_flops=2 * heads * (query_dim + value_dim),
        kv_elements=kv_rank + rope_dim,
        kv_heads=1,
        projections=tuple(projections),
        reach=reach,
    )


def index_attention(heads: int, head_dim: int, stride: int = 1, key_bytes: float | None = None) -> Attention:
    """Return what chooses the tokens that a layer attends to: heads that share one key.

    Args:
        heads, head_dim: of its queries.
        stride: tokens that have a key together.
        key_bytes: of a key; None for vLLM's layout of DeepSeek-V3.2: FP8, with a scale in float32 for each 128.
    """
    kept = head_dim + 4 * -(-head_dim // 128) if key_bytes is None else key_bytes
    return Attention(0, 2 * heads * head_dim / stride, 0, 1, kv_bytes=kept / stride)


def gated_delta(
    hidden: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    taps: int,
    element_bytes: int,
    state_bytes: int,
) -> State:
    """Return linear attention by the gated delta rule (arXiv 2412.06464), as Qwen3-Next has it.

    Args:
        hidden, key_heads, value_heads, key_dim, value_dim: of the layer.
        taps: of the convolution before it.
        element_bytes: of an element of the last inputs of that convolution.
        state_bytes: of an element of the state.
    """
    keys, values = key_heads * key_dim, value_heads * value_dim
    projections = (
        ("in_proj_qkvz", hidden * (2 * keys + values)),
        ("in_proj_z", hidden * values),
        ("in_proj_ba", hidden * 2 * value_heads),
        ("out_proj", values * hidden),
    )
    parameters = sum(weights for _, weights in projections)
    state = state_bytes * value_heads * key_dim * value_dim + element_bytes * (taps - 1) * (2 * keys + values)
    return State(parameters + taps * (2 * keys + values), state, projections)


def kimi_delta(hidden: int, heads: int, head_dim: int, taps: int, element_bytes: int) -> State:
    """Return Kimi's delta attention (arXiv 2510.26692): a gate for each channel, of low rank; its state has 32 bits.

    Args:
        hidden, heads, head_dim: of the layer.
        taps, element_bytes: as in `gated_delta`.
    """
    inner = heads * head_dim
    low_rank = hidden * head_dim + head_dim * inner
    projections = (
        ("q_proj", hidden * inner),
        ("k_proj", hidden * inner),
        ("v_proj", hidden * inner),
        ("f_proj", low_rank),
        ("g_proj", low_rank),
        ("b_proj", hidden * heads),
        ("o_proj", inner * hidden),
    )
    parameters = sum(weights for _, weights in projections) + 3 * taps * inner
    return State(parameters, 4 * inner * head_dim + element_bytes * (taps - 1) * 3 * inner, projections)


def mamba1(hidden: int, inner: int, state: int, taps: int, rank: int, element_bytes: int) -> State:
    """Return a Mamba layer (arXiv 2312.00752).

    Args:
        hidden: width of the residual stream.
        inner: its own width.
        state: numbers kept for each channel.
        taps, element_bytes: as in `gated_delta`; the state has elements of the same size.
        rank: of the step sizes.
    """
    projections = (
        ("in_proj", 2 * hidden * inner),
        ("x_proj", inner * (rank + 2 * state)),
        ("dt_proj", rank * inner),
        ("out_proj", inner * hidden),
    )
    parameters = sum(weights for _, weights in projections) + inner * (taps + state)
    return State(parameters, element_bytes * inner * (state + taps - 1), projections)


def mamba2(
    hidden: int,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    taps: int,
    element_bytes: int,
    state_bytes: int,
) -> State:
    """Return a Mamba-2 layer (arXiv 2405.21060); `taps` and the sizes are as in `gated_delta`."""
    inner, mixed = heads * head_dim, heads * head_dim + 2 * groups * state
    projections = (("in_proj", hidden * (inner + mixed + heads)), ("out_proj", inner * hidden))
    parameters = sum(weights for _, weights in projections) + taps * mixed
    kept = state_bytes * heads * head_dim * state + element_bytes * (taps - 1) * mixed
    return State(parameters, kept, projections)


def short_convolution(hidden: int, taps: int, element_bytes: int) -> State:
    """Return a gated convolution over the last `taps` tokens, as LFM2 has it."""
    projections = (("in_proj", 3 * hidden * hidden), ("out_proj", hidden * hidden))
    parameters = sum(weights for _, weights in projections) + taps * hidden
    return State(parameters, element_bytes * (taps - 1) * hidden, projections)
