"""A model's shape out of its config.json, by the names that its keys have in transformers.

Every key that says something of the shape must be understood: one that is not is an error that names it, so that
no model is ever taken for a plain dense one because it hides what it is.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.layers import (
    Attention,
    Experts,
    LayerKind,
    State,
    gated_delta,
    grouped_attention,
    latent_attention,
    mamba2,
)
from vllm_sarathi.simulation.quantization import Precision, precision_of

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

INNER = ("text_config", "llm_config", "language_config")
"""Where models that see and hear keep the decoder's keys."""

SHAPES = re.compile(
    r"expert|moe|lora|mamba|ssm|conv_|linear_|window|sliding|index_|indexer|latent|^hc_|compress|attn|attention|head"
    r"|layer|block|ffn|mlp|intermediate|hidden_size|^state|share|nope|rope_head|n_embd|n_inner|alibi|rank"
)
"""Names of keys that say something of a model's shape."""

UNDERSTOOD_NAMES = """
    num_hidden_layers n_layer hidden_size n_embd num_attention_heads n_head num_key_value_heads num_kv_heads
    multi_query new_decoder_architecture head_dim attention_head_dim v_head_dim global_head_dim
    num_global_key_value_heads attention_k_eq_v swa_head_dim swa_v_head_dim swa_num_attention_heads
    swa_num_key_value_heads qk_head_dim qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank
    index_n_heads index_head_dim attn_output_gate attention_output_gate intermediate_size ffn_hidden_size n_inner
    intermediate_size_mlp mlp_layer_types mlp_only_layers first_k_dense_replace moe_layer_freq decoder_sparse_step
    interleave_moe_layer_step layer_types layers_block_type hybrid_override_pattern hybrid_layer_pattern
    sliding_window sliding_window_size sliding_window_pattern use_sliding_window attention_chunk_size max_window_layers
    full_attention_interval num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok
    num_experts_per_token top_k_experts experts_per_token moe_intermediate_size moe_latent_size n_shared_experts
    num_shared_experts moe_shared_expert_intermediate_size shared_expert_intermediate_size
    shared_intermediate_size share_expert_dim enable_moe_block linear_conv_kernel_dim linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim mamba_num_heads
    ssm_state_size conv_kernel n_groups attn_type_list
"""

UNDERSTOOD = frozenset(UNDERSTOOD_NAMES.split())
"""Keys that are read here, or whose only value that is not refused changes nothing."""

HARMLESS = re.compile(
    r"bias|dropout|norm|_act$|act_fn|activation|eps|(?<!expert_)dtype|mtp|nextn|router|_loss|token_id|logits|implementation"
    r"|index_topk|indexer_types|index_share|index_skip|indexer_rope|moe_renormalize|overlap|pretraining|chunk_size_feed"
    r"|output_attentions|output_hidden|add_cross|cross_attention_hidden|is_|pruned_heads|use_cache|sink|value_scale"
    r"|head_dim_rope|time_step|_proj_bias|use_mamba|_freqs|bidirectional|hash|interleave$|per_layer_input|n_group$"
    r"|moe_router|routed_scaling|num_kv_shared_layers|use_double_wide|attention_multiplier|scale_attn|reorder"
    r"|no_rope_layer|attn_scale|attn_temperature|floor_scale|kv_cache|parallel_attn|attn_pdrop|softcap|query_pre_attn"
)
"""Names of keys that look as if they did and change nothing of weights or cache."""


GATED = ("silu", "swiglu", "geglu", "gelu_pytorch_tanh", "swigluoai", "situ")
PLAIN = ("gelu", "gelu_new", "gelu_fast", "relu", "relu2")
"""Activations of MLPs with a gate, and without."""

UNGATED = ("falcon", "RefinedWeb", "RefinedWebModel", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "starcoder2")
"""Types of models whose MLP has no gate, whatever they call their activation."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A decoder's part of a config.json.

    Attributes:
        config: its keys.
        origin: what errors call it.
    """

    config: Mapping[str, Any]
    origin: str

    def number(self, *keys: str, default: int | None = None) -> int:
        """Return the first of some keys that is set.

        Raises:
            ConfigError: none is, and there is no default; or one is no whole number.
        """
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{self.origin}: {key!r} must be a whole number, not {value!r}.")
            return value
        if default is None:
            raise ConfigError(
                f"{self.origin}: has no whole number {keys[0]!r}, which a decoder's config.json has."
            )
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether a key is set to true."""
        value = self.config.get(key)
        return default if value is None else bool(value)

    def names(self, key: str, count: int) -> list[str] | None:
        """Return a list with an entry for each layer, or None where there is none.

        Raises:
            ConfigError: it has not one for each layer.
        """
        value = self.config.get(key)
        if value in (None, []):
            return None
        if not isinstance(value, Sequence) or len(value) < count:
            raise ConfigError(f"{self.origin}: {key!r} must have an entry for each of the {count} layers.")
        return [str(entry) for entry in value[:count]]


def check_understood(config: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError naming a key that says something of the shape and is not understood."""
    for key, value in config.items():
        if value in (None, False, 0, 0.0, "", [], {}) or key in UNDERSTOOD or not SHAPES.search(key):
            continue
        if HARMLESS.search(key):
            continue
        raise ConfigError(
            f"{origin}: {key!r} is not understood, and would change the model's shape; a model of aiconfigurator-core "
            "(pip install 'vllm-sarathi[devices]'), named OWNER/MODEL, has measured times."
        )


def decoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json's decoder, with what the whole file says of its weights."""
    inner = next((config[key] for key in INNER if isinstance(config.get(key), Mapping)), None)
    if inner is None:
        return dict(config)
    outer = ("quantization_config", "compression_config", "torch_dtype", "dtype", "tie_word_embeddings")
    return {**{key: config[key] for key in outer if key in config}, **inner}


def read_layers(read: Reader) -> list[LayerKind]:
    """Return the layers that a config.json describes, those that are alike together.

    Raises:
        ConfigError: a key that is not understood, missing, or out of range.
    """
    blocks = _block_names(read)
    layers = len(blocks) if blocks is not None else read.number("num_hidden_layers", "n_layer")
    if layers < 1:
        raise ConfigError(f"{read.origin}: 'num_hidden_layers' must be at least 1, not {layers}.")
    if blocks is not None:
        return _grouped(_block(read, name) for name in blocks)
    mixers, sparse = _mixers(read, layers), _sparse_layers(read, layers)
    experts = _experts(read) if any(sparse) else None
    dense = _dense_mlp(read)
    also = dense if read.flag("enable_moe_block") else 0
    return _grouped(
        (*mixer, experts, also) if is_sparse else (*mixer, None, dense)
        for mixer, is_sparse in zip(mixers, sparse, strict=True)
    )


Mixer = tuple[Attention | None, State | None]


def _grouped(layers: Any) -> list[LayerKind]:
    return [LayerKind(count, *kind) for kind, count in Counter(layers).items()]


def _attention(read: Reader, local: bool = False) -> Attention:
    """Return the attention of a layer; `local` for one that looks back a window alone."""
    hidden = read.number("hidden_size", "n_embd")
    heads = read.number("num_attention_heads", "n_head")
    if read.config.get("kv_lora_rank"):
        indexer = None
        if read.config.get("index_n_heads"):
            indexer = (read.number("index_n_heads"), read.number("index_head_dim"))
        return latent_attention(
            hidden,
            heads,
            read.number("q_lora_rank", default=0),
            read.number("kv_lora_rank"),
            read.number("qk_nope_head_dim"),
            read.number("qk_rope_head_dim"),
            read.number("v_head_dim"),
            indexer,
        )
    one = 1 if read.flag("multi_query") and not read.flag("new_decoder_architecture") else heads
    kv_heads = read.number("num_key_value_heads", "num_kv_heads", default=one)
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
        if read.config.get("global_head_dim"):
            head_dim = value_dim = read.number("global_head_dim")
    return grouped_attention(
        hidden,
        heads,
        kv_heads,
        head_dim,
        value_dim=value_dim,
        window=window,
        gated=read.flag("attn_output_gate") or read.flag("attention_output_gate"),
        keys_are_values=not local and read.flag("attention_k_eq_v"),
    )


def _mixers(read: Reader, layers: int) -> list[Mixer]:
    """Return what mixes tokens in each layer."""
    kinds = read.names("layer_types", layers) or _implied_kinds(read, layers)
    made: dict[str, Mixer] = {}
    for kind in set(kinds):
        if kind in ("full_attention", "deepseek_sparse_attention"):
            made[kind] = (_attention(read), None)
        elif kind in ("sliding_attention", "chunked_attention"):
            made[kind] = (_attention(read, local=True), None)
        elif kind == "linear_attention":
            made[kind] = (None, _linear(read))
        else:
            raise ConfigError(f"{read.origin}: 'layer_types' has {kind!r}, which is not understood.")
    return [made[kind] for kind in kinds]


def _implied_kinds(read: Reader, layers: int) -> list[str]:
    pattern = read.names("hybrid_layer_pattern", layers)
    if pattern is not None:
        return ["sliding_attention" if entry == "1" else "full_attention" for entry in pattern]
    every = read.number("full_attention_interval", default=0)
    if every:
        return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if read.config.get("attention_chunk_size") and read.config.get("interleave_moe_layer_step"):
        # Llama 4: every fourth layer has no positions, and looks at all.
        return ["chunked_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    full_every = read.number(
        "sliding_window_pattern", default=2 if read.config.get("model_type") == "gemma2" else 0
    )
    if full_every > 1:
        return ["sliding_attention" if (i + 1) % full_every else "full_attention" for i in range(layers)]
    window, longest = read.config.get("sliding_window"), read.config.get("max_position_embeddings") or 0
    if isinstance(window, int) and window < longest and read.flag("use_sliding_window", True):
        return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _linear(read: Reader) -> State:
    return gated_delta(
        read.number("hidden_size"),
        read.number("linear_num_key_heads"),
        read.number("linear_num_value_heads"),
        read.number("linear_key_head_dim"),
        read.number("linear_value_head_dim"),
        read.number("linear_conv_kernel_dim"),
        element_bytes(read),
    )


def _sparse_layers(read: Reader, layers: int) -> list[bool]:
    """Return which layers have experts."""
    if not _expert_count(read) or read.config.get("enable_moe_block") is False:
        return [False] * layers
    named = read.names("mlp_layer_types", layers)
    if named is not None:
        return [name == "sparse" for name in named]
    frequency = read.config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return [entry == "1" for entry in read.names("moe_layer_freq", layers) or ()]
    every = read.number("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1)
    if every < 1:
        raise ConfigError(f"{read.origin}: a layer of experts every {every} layers is none.")
    first = read.number("first_k_dense_replace", default=0)
    dense = set(read.config.get("mlp_only_layers") or ())
    return [i >= first and (i + 1) % every == 0 and i not in dense for i in range(layers)]


def _expert_count(read: Reader) -> int:
    return read.number("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", default=0)


def is_gated(read: Reader) -> bool:
    """Return whether an MLP has a gate."""
    if read.config.get("model_type") in UNGATED:
        return False
    keys = ("mlp_hidden_act", "hidden_act", "hidden_activation")
    act = next((str(read.config[key]) for key in keys if read.config.get(key)), "silu")
    if act not in GATED and act not in PLAIN:
        raise ConfigError(
            f"{read.origin}: 'hidden_act' is {act!r}, which is not understood; known are "
            f"{', '.join((*GATED, *PLAIN))}."
        )
    return act in GATED


def _gates(read: Reader) -> int:
    """Return the matrices of an MLP."""
    return 3 if is_gated(read) else 2


def _dense_mlp(read: Reader) -> int:
    hidden = read.number("hidden_size", "n_embd")
    width = read.number(
        "intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden
    )
    return _gates(read) * hidden * width


def _experts(read: Reader) -> Experts:
    hidden, gates = read.number("hidden_size"), _gates(read)
    width = read.number("moe_intermediate_size", "intermediate_size")
    inner = read.number("moe_latent_size", default=hidden)
    count = _expert_count(read)
    active = read.number("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "experts_per_token")
    if not 1 <= active <= count:
        raise ConfigError(f"{read.origin}: 'num_experts_per_tok' is {active}, of {count} experts.")
    shared = read.number("n_shared_experts", "num_shared_experts", default=0)
    shared_width = read.number(
        "moe_shared_expert_intermediate_size",
        "shared_expert_intermediate_size",
        "share_expert_dim",
        "shared_intermediate_size",
        default=shared * width,
    )
    if read.config.get("interleave_moe_layer_step"):
        shared_width = width  # Llama 4 has one, of an expert's width
    projections = 2 * hidden * inner if inner != hidden else 0
    return Experts(
        count=count,
        active=active,
        parameters=gates * inner * width,
        shared_parameters=hidden * count + gates * hidden * shared_width + projections,
    )


def _block_names(read: Reader) -> list[str] | None:
    """Return the blocks of a model whose layers are one thing each (Nemotron-H)."""
    pattern = read.config.get("hybrid_override_pattern")
    names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if pattern:
        unknown = sorted(set(pattern) - set(names))
        if unknown:
            raise ConfigError(
                f"{read.origin}: 'hybrid_override_pattern' has {unknown[0]!r}, which is not understood."
            )
        return [names[letter] for letter in pattern]
    blocks = read.config.get("layers_block_type")
    return [str(block) for block in blocks] if blocks else None


def _block(read: Reader, name: str) -> tuple[Any, ...]:
    makers: dict[str, Callable[[], tuple[Any, ...]]] = {
        "mamba": lambda: (None, _mamba(read), None, 0),
        "attention": lambda: (_attention(read), None, None, 0),
        "mlp": lambda: (None, None, None, _dense_mlp(read)),
        "moe": lambda: (None, None, _experts(read), 0),
    }
    if name not in makers:
        raise ConfigError(f"{read.origin}: 'layers_block_type' has {name!r}, which is not understood.")
    return makers[name]()


def _mamba(read: Reader) -> State:
    return mamba2(
        read.number("hidden_size"),
        read.number("mamba_num_heads"),
        read.number("mamba_head_dim"),
        read.number("n_groups"),
        read.number("ssm_state_size"),
        read.number("conv_kernel"),
        element_bytes(read),
    )


def element_bytes(read: Reader) -> int:
    """Return the bytes of an element that is not quantized.

    Raises:
        ConfigError: a type that is none of DTYPE_BYTES.
    """
    for key in ("torch_dtype", "dtype"):
        said = read.config.get(key)
        if said is not None:
            if str(said) not in DTYPE_BYTES:
                raise ConfigError(f"{read.origin}: {key!r} is {said!r}; known are {', '.join(DTYPE_BYTES)}.")
            return DTYPE_BYTES[str(said)]
    return 2


def read_precision(read: Reader, layers: int) -> Precision:
    """Return the precision that a config.json states; see `quantization.precision_of`."""
    return precision_of(read.config, element_bytes(read), layers, read.origin)
