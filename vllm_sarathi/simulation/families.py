"""Which models are understood, by the `model_type` of their config.json, and what each takes where a key is left out.

A config.json leaves out what its family's configuration class in transformers has by default, and says nothing of
what the code of the model always does: whether an MLP has a gate, whether one matrix serves as input and as output
embedding. So a family that is not in this table is refused: it could be anything.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_sarathi.core.config import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What holds for all models of a `model_type`.

    Attributes:
        gated: whether an MLP has a gate: three matrices, else two. It is the model's code that decides, whatever the
            activation is.
        tied: whether input and output embedding are one where `tie_word_embeddings` is left out; None where the
            configuration class comes with the checkpoint, and it has to be stated.
        own_heads: whether each head has its own keys and values where their number is left out; else it has to be
            stated.
        keys: names of keys in its config.json, by what others call the same.
        nested: objects in its config.json whose keys are the decoder's; with the names of such keys, as in `keys`.
        state: what layers without attention have in its place: one of `config_states.MAKERS`, or "".
        state_type: the key that says the type of the state; None where it is that of the model.
        state_in: where layers have it: in the place of attention in some of them; beside it in all; or alone, so that
            there is neither attention nor an MLP.
        defaults: what its configuration class takes for keys that are left out, where that is no harmless value.
        experts: keys of how many experts a layer has and how wide each is, which have to be stated where all models
            of the family are mixtures; empty for a family that has dense models, in which these keys are left out.
    """

    gated: bool = True
    tied: bool | None = False
    own_heads: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    nested: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    state: str = ""
    state_type: str | None = None
    state_in: Literal["some", "all", "alone"] = "some"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[()] | tuple[str, str] = ()

    @property
    def matrices(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.gated else 2


STATED = Family()
MANY_HEADS = Family(own_heads=True)
CUSTOM = Family(tied=None)

GPT_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
"""What GPT-2 and those after it call the keys of all others."""

MAMBA2_KEYS = {
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "n_groups": "mamba_n_groups",
    "ssm_state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
}
"""What models with Mamba-2 beside attention call the keys of Nemotron-H."""

SPARSE_INDEX = {
    "sparse_attention_config": {
        "index_n_heads": "sparse_num_index_heads",
        "index_head_dim": "sparse_index_dim",
        "index_block_size": "sparse_block_size",
        "index_topk_blocks": "sparse_topk_blocks",
        "index_local_blocks": "sparse_local_block",
    }
}
"""What MiniMax-M3 calls the keys of which blocks a layer attends to."""

UNBOUNDED = {"max_position_embeddings": 2048}
"""A model without positions says no longest sequence; vLLM then takes one, unless it is told another."""

OWN_WIDTH, DENSE_WIDTH = "moe_intermediate_size", "intermediate_size"
EXPERTS, LOCAL_EXPERTS = ("num_experts", OWN_WIDTH), ("num_local_experts", DENSE_WIDTH)
ROUTED_EXPERTS = ("n_routed_experts", OWN_WIDTH)
"""What mixtures call the number of their experts, and the width of one."""

LATENT = Family(own_heads=True, experts=ROUTED_EXPERTS)
"""Families with latent attention: their number of key heads says nothing."""

FAMILIES: dict[str, Family] = {
    # Dense, with gates.
    **dict.fromkeys(
        ("llama", "granite", "helium", "hyperclovax", "olmo", "olmo2", "stablelm", "glm"), MANY_HEADS
    ),
    **dict.fromkeys(("qwen2", "phi3", "hunyuan_v1_dense"), MANY_HEADS),
    **dict.fromkeys(("qwen3_vl_text", "qwen2_vl_text", "qwen2_5_vl_text", "seed_oss"), STATED),
    "cwm": Family(defaults={"sliding_window": 8192, "sliding_window_pattern": "GLLL"}),
    # Published with the decoder's keys among the others.
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), STATED),
    "glm4v_text": STATED,
    **dict.fromkeys(("qwen3", "glm4"), Family(defaults={"head_dim": 128})),
    **dict.fromkeys(("mistral", "ministral"), Family(defaults={"sliding_window": 4096})),
    "ministral3": STATED,
    "olmo3": Family(own_heads=True, defaults={"sliding_window": 4096, "sliding_window_pattern": 4}),
    "exaone4": Family(defaults={"sliding_window": 4096, "sliding_window_pattern": 4}),
    "smollm3": Family(tied=True, defaults={"use_sliding_window": False}),
    "ernie4_5": Family(tied=True, defaults={"head_dim": 128}),
    "cohere": Family(tied=True, own_heads=True),
    "cohere2": Family(
        tied=True, own_heads=True, defaults={"sliding_window": 4096, "sliding_window_pattern": 4}
    ),
    "gemma": Family(tied=True, defaults={"head_dim": 256}),
    "gemma2": Family(
        tied=True, defaults={"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2}
    ),
    "gemma3_text": Family(
        tied=True, defaults={"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 6}
    ),
    "gemma3n_text": Family(
        tied=True, defaults={"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 5}
    ),
    "gemma4_text": Family(
        tied=True,
        defaults={"head_dim": 256, "global_head_dim": 512, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"enable_moe_block": False},
        experts=EXPERTS,
    ),
    **dict.fromkeys(("internlm2", "internlm3", "orion", "solar", "mimo", "baichuan", "minicpm"), CUSTOM),
    "exaone": Family(tied=None, keys={"num_hidden_layers": "num_layers"}),
    "chatglm": Family(
        tied=None,
        keys={
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "num_key_value_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "max_position_embeddings": "seq_length",
            "vocab_size": "padded_vocab_size",
        },
    ),
    # Dense, without gates.
    **dict.fromkeys(("nemotron", "arcee", "apertus"), Family(gated=False, own_heads=True)),
    **dict.fromkeys(("phi", "gpt_neox", "persimmon"), Family(gated=False, own_heads=True)),
    "starcoder2": Family(gated=False, tied=True),
    "gpt2": Family(gated=False, tied=True, own_heads=True, keys=GPT_KEYS),
    "gptj": Family(gated=False, own_heads=True, keys=GPT_KEYS),
    "gpt_bigcode": Family(
        gated=False, tied=True, own_heads=True, keys=GPT_KEYS, defaults={"multi_query": True}
    ),
    **dict.fromkeys(
        ("falcon", "RefinedWeb", "RefinedWebModel"),
        Family(
            gated=False,
            tied=True,
            own_heads=True,
            keys={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
            defaults={"multi_query": True, "max_position_embeddings": 2048},
        ),
    ),
    "opt": Family(gated=False, tied=True, own_heads=True, keys={"intermediate_size": "ffn_dim"}),
    "bloom": Family(
        gated=False,
        tied=True,
        own_heads=True,
        keys={
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
        },
        defaults={"max_position_embeddings": 2048},
    ),
    # Mixtures of experts.
    **dict.fromkeys(("mixtral", "phimoe", "minimax_m2"), Family(experts=LOCAL_EXPERTS)),
    "gpt_oss": Family(defaults={"sliding_window": 128, "sliding_window_pattern": 2}, experts=LOCAL_EXPERTS),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "hy_v3"), Family(experts=EXPERTS)),
    **dict.fromkeys(("granitemoe", "granitemoeshared"), Family(own_heads=True, experts=LOCAL_EXPERTS)),
    "olmoe": Family(own_heads=True, experts=("num_experts", DENSE_WIDTH)),
    "dots1": Family(own_heads=True, experts=ROUTED_EXPERTS),
    **dict.fromkeys(("glm4_moe", "solar_open"), Family(experts=ROUTED_EXPERTS)),
    "hunyuan_v1_moe": STATED,
    **dict.fromkeys(
        ("qwen3_vl_moe_text", "bailing_moe", "bailing_moe_v2"), Family(tied=None, experts=EXPERTS)
    ),
    "mimo_v2_flash": Family(
        tied=None,
        # All of the first, and of each sixth.
        defaults={"sliding_window": 128, "sliding_window_pattern": "GLLLLG" + 170 * "LLLLLG"},
        experts=ROUTED_EXPERTS,
    ),
    "step3p7": Family(experts=("moe_num_experts", OWN_WIDTH)),
    "ernie4_5_moe": Family(tied=True, experts=("moe_num_experts", OWN_WIDTH)),
    **dict.fromkeys(
        ("minimax_m3", "minimax_m3_text", "minimax_m3_vl_text"),
        Family(nested=SPARSE_INDEX, experts=LOCAL_EXPERTS),
    ),
    "llama4_text": Family(
        defaults={"attention_chunk_size": 8192, "interleave_moe_layer_step": 1}, experts=LOCAL_EXPERTS
    ),
    # Latent attention.
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite"), LATENT),
    "deepseek_v4": Family(experts=ROUTED_EXPERTS),
    "kimi_k2": Family(tied=None, own_heads=True, experts=ROUTED_EXPERTS),
    "minicpm3": Family(tied=True, own_heads=True),
    # Linear attention, Mamba and convolutions.
    "qwen3_next": Family(state="gated_delta", experts=EXPERTS),
    "qwen3_5_text": Family(state="gated_delta", state_type="mamba_ssm_dtype"),
    "qwen3_5_moe_text": Family(state="gated_delta", state_type="mamba_ssm_dtype", experts=EXPERTS),
    "kimi_linear": Family(
        own_heads=True,
        keys={
            "max_position_embeddings": "model_max_length",
            "num_experts_per_tok": "num_experts_per_token",
            "n_shared_experts": "num_shared_experts",
        },
        nested={
            "linear_attn_config": {
                "linear_num_heads": "num_heads",
                "linear_head_dim": "head_dim",
                "linear_conv_kernel_dim": "short_conv_kernel_size",
            }
        },
        state="kimi_delta",
        experts=EXPERTS,
    ),
    "nemotron_h": Family(
        gated=False,
        state="mamba2",
        state_type="mamba_ssm_cache_dtype",
        defaults={"mamba_ssm_cache_dtype": "float32"},
        experts=ROUTED_EXPERTS,
    ),
    "zamba2": Family(
        tied=True,
        own_heads=True,
        keys={**MAMBA2_KEYS, "mamba_num_heads": "n_mamba_heads", "mamba_head_dim": "mamba_headdim"}
        | {"n_groups": "mamba_ngroups"},
        state="mamba2",
    ),
    "granitemoehybrid": Family(own_heads=True, keys=MAMBA2_KEYS, state="mamba2", experts=LOCAL_EXPERTS),
    "falcon_h1": Family(own_heads=True, keys=MAMBA2_KEYS, state="mamba2", state_in="all"),
    "jamba": Family(
        keys={
            "ssm_state_size": "mamba_d_state",
            "conv_kernel": "mamba_d_conv",
            "time_step_rank": "mamba_dt_rank",
        },
        state="mamba1",
        defaults={
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        experts=("num_experts", DENSE_WIDTH),
    ),
    **dict.fromkeys(
        ("mamba", "falcon_mamba"),
        Family(
            tied=True,
            keys={"ssm_state_size": "state_size", "mamba_expand": "expand"},
            state="mamba1",
            state_in="alone",
            defaults=UNBOUNDED,
        ),
    ),
    "mamba2": Family(
        keys={
            "mamba_num_heads": "num_heads",
            "mamba_head_dim": "head_dim",
            "ssm_state_size": "state_size",
            "mamba_expand": "expand",
        },
        state="mamba2",
        state_in="alone",
        defaults=UNBOUNDED,
    ),
    "lfm2": Family(
        tied=True,
        keys={"intermediate_size": "block_ff_dim", "tie_word_embeddings": "tie_embedding"},
        state="short_convolution",
        defaults={"block_auto_adjust_ff_dim": True, "block_multiple_of": 256},
    ),
    "lfm2_moe": Family(
        tied=True,
        keys={"tie_word_embeddings": "tie_embedding"},
        state="short_convolution",
        experts=EXPERTS,
    ),
    # Others.
    "dbrx": Family(
        keys={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
        nested={
            "attn_config": {"num_key_value_heads": "kv_n_heads"},
            "ffn_config": {"intermediate_size": "ffn_hidden_size", "num_experts_per_tok": "moe_top_k"},
        },
        experts=("moe_num_experts", DENSE_WIDTH),
    ),
    "nemotron-nas": Family(),
}
"""Families by `model_type`: of models that vLLM serves. Defaults are those of the configuration classes of
transformers 5; a test compares them."""


def family_of(config: Mapping[str, Any], origin: str) -> Family:
    """Return the family of a decoder.

    Args:
        config: the decoder's keys.
        origin: what errors call it.

    Raises:
        ConfigError: it names none, or one that is not understood.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{origin}: has no 'model_type', which says how to read all other keys, as in "
            '"model_type": "llama".'
        )
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{origin}: 'is_encoder_decoder' is set; only decoders are understood.")
    found = FAMILIES.get(name)
    if found is None:
        raise ConfigError(
            f"{origin}: 'model_type' is {name!r}, which is not understood; {len(FAMILIES)} are, such as llama, "
            "qwen3_moe, deepseek_v3 and nemotron_h. A model that computes what one of them does can say so in a copy "
            "of its config.json; a model of aiconfigurator-core (pip install 'vllm-sarathi[devices]'), named "
            "OWNER/MODEL, has measured times."
        )
    return found


SERVED_AS = {"kimi_k2": "deepseek_v3", "minimax_m3_vl_text": "minimax_m3"}
"""Families whose `architectures` name the class of another."""


def contradicting(config: Mapping[str, Any]) -> list[str]:
    """Return the `architectures` that are of another family than `model_type`: vLLM goes by the former."""
    own = config["model_type"]
    others = {_plain(name) for name in FAMILIES} - {_plain(own), _plain(SERVED_AS.get(own, own))}
    named = config.get("architectures")
    texts = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return [name for name in texts if _plain(name) in others]


def _plain(name: str) -> str:
    """Return a family's name or a class's as both would be written without signs."""
    return re.sub(r"For[A-Z].*|LMHeadModel$|Model$|_text$|[^A-Za-z0-9]", "", name).lower()
