"""Mixtures of experts out of a config.json: which layers have them, how many, and how wide they are."""

from vllm_sarathi.simulation.config_reader import Reader
from vllm_sarathi.simulation.layers import Experts


def sparse_layers(read: Reader, layers: int) -> list[bool]:
    """Return which layers have experts."""
    named = read.names("mlp_layer_types", layers)
    frequency = read.names("moe_layer_freq", layers) if isinstance(read.get("moe_layer_freq"), list) else None
    listed = read.names("moe_layers")  # Llama 4
    dense = set(read.names("mlp_only_layers") or ())
    wanted = read.get("enable_moe_block") is None or read.flag("enable_moe_block")
    for key in (*OF_EXPERTS, *COUNTS):
        read.get(key)
    if not wanted or not _expert_count(read):
        return [False] * layers
    if named is not None:
        return [name == "sparse" for name in named]
    if frequency is not None:
        return [entry == "1" for entry in frequency]
    if listed is not None:
        return [str(i) in listed for i in range(layers)]
    if period := read.number("expert_layer_period", default=0):
        offset = read.number("expert_layer_offset", least=0)
        return [i % period == offset for i in range(layers)]
    every = read.number(
        "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", "moe_layer_interval", default=1
    )
    first = read.number(
        "first_k_dense_replace",
        "moe_layer_start_index",
        "moe_layer_num_skipped",
        "num_dense_layers",
        default=0,
    )
    last = read.number("moe_layer_end_index", default=layers - 1, least=-1)
    last = layers - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % every == 0 and str(i) not in dense for i in range(layers)]


OF_EXPERTS = (
    "decoder_sparse_step",
    "first_k_dense_replace",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "top_k_experts",
    "moe_topk",
    "use_mixed_mlp_moe",
)
"""Keys that a family's dense models have, too, or that another key overrides."""


COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""What families call the number of experts."""


def _expert_count(read: Reader) -> int:
    """Return how many experts a layer has; of a mixture that does not say so, an error that names the key."""
    left_out = read.family.experts and not any(key in read.config for key in COUNTS)
    count = read.number(*read.family.experts[:1], *COUNTS, default=None if left_out else 0)
    # One expert is none: it is how Hunyuan says that a model is dense.
    return 0 if count == 1 else count


def read_experts(read: Reader) -> Experts:
    """Return the experts of a layer."""
    hidden, matrices = read.number("hidden_size"), read.family.matrices
    width = read.number(*(read.family.experts[1:] or ("moe_intermediate_size", "intermediate_size")))
    inner = read.number("moe_latent_size", default=hidden)
    count = _expert_count(read)
    active = read.number(
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "experts_per_token",
        "moe_k",
        "moe_topk",
    )
    if active > count:
        raise read.error(f"'num_experts_per_tok' is {active}, of {count} experts.")
    shared = read.number(
        "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts", default=0
    )
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
        parameters=matrices * inner * width,
        shared_parameters=hidden * count + matrices * hidden * shared_width + projections,
        width=width,
        shared_width=shared_width,
    )
