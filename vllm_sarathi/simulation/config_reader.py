"""Reading a config.json so that nothing of it is passed over: what is asked for is noted, and the rest is looked at.

A key that was not asked for and that looks as if it said something of the model's shape is an error that names it.
Another one with a number, a list or an object is a warning, unless it is known to change nothing.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sarathi.core.errors import ConfigError, short
from vllm_sarathi.simulation.families import Family, contradicting, family_of

INNER = ("text_config", "llm_config", "language_config")
"""Where models that see and hear keep the decoder's keys."""

OF_ALL = ("quantization_config", "compression_config", "torch_dtype", "dtype", "tie_word_embeddings")
"""Keys that such a model has outside of them, and that hold for the decoder."""

MOST = 2**24
"""The largest number that a config.json may say: more than any context or vocabulary."""

SHAPES = re.compile(
    r"expert|moe|lora|mamba|ssm|conv_|linear_|window|sliding|index_|indexer|latent|^hc_|compress|attn|attention|head"
    r"|layer|block|ffn|mlp|intermediate|hidden_size|state|share|nope|rope_head|n_embd|n_inner|alibi|rank|lru|rwkv"
    r"|time_mix|recurren|decoder|encoder|loop|_steps$|_dim$|^d_|^dim|width|depth|kv|quant|altup|laurel|sparsity|cla$"
)
"""Names of keys that say something of a model's shape."""

HARMLESS = re.compile(
    r"bias|dropout|norm|_act$|act_fn|activation|eps|(?<!expert_)dtype|mtp|nextn|router|_loss|token_id|logits|implementation"
    r"|index_topk|indexer_types|index_share|index_skip|indexer_rope|moe_renormalize|overlap|pretraining|chunk_size_feed"
    r"|output_attentions|output_hidden|add_cross|cross_attention_hidden|is_|pruned_heads|use_cache|sink|value_scale"
    r"|head_dim_rope|time_step|_proj_bias|use_mamba|_freqs|bidirectional|hash|interleave$|vocab_size_per_layer_input"
    r"|n_group$|routed_scaling|attention_multiplier|scale_attn|reorder|no_rope_layer|attn_scale|attn_temperature"
    r"|floor_scale|kv_cache|parallel_attn|pdrop|softcap|query_pre_attn|encoder_no_repeat|decoder_start"
    r"|tie_encoder|rotary_dim|_fusion|dropless|decoder_attention_heads_fused|head_dtype|layer_sep|use_flash"
    r"|apply_query_key|softmax_in|residual_connection_post|^clip_|mamba_chunk|(?<!_dim)_multipliers?$|_expert_group"
    r"|mlp_init_scale|block_out_init|block_use|conv_use|nope$|full_attn_mod|layer_switch|moe_capacity|moe_use_aux"
    r"|cla_share|parallel_block|parallel_embedding|^dim_model_base$|^scale_depth$|fp32_combine"
)
"""Names of keys that look as if they did and change nothing of weights or cache."""

NEUTRAL = re.compile(
    r"rope|rotary|init|theta|temperature|top_|topk|beam|length|penalty|scal|multiplier|coef|alpha|vision|image|video|audio"
    r"|token|label|version|auto_map|task_|bad_words|architectures|_plan|seq|summary|return|problem|cap$|std|n_ctx"
    r"|max_batch|ep_size|pretrain|template|_factor|finetuning|n_special|speech|hidden_dropout|spatial|temporal|position"
    r"|no_repeat|diversity|type_vocab|generation|unsloth|gate$|^mup_|decay|max_z|z_loss|merge|group_size$|_config$|timm"
    r"|projector|mm_|typical_p|ignore_index|^chunk_size$|^expand$|_limit$"
)
"""Names of other keys that change nothing of them."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A decoder's part of a config.json.

    Attributes:
        config: its keys, by the names that most families give them, with its family's defaults.
        origin: what errors call it.
        family: its family.
        outside: the keys around it of a model that sees or hears.
        nested: whether the decoder is a part of the file, which transformers saves as its differences from the
            configuration class.
        asked: keys that have been asked for.
    """

    config: Mapping[str, Any]
    origin: str
    family: Family
    outside: Mapping[str, Any] = field(default_factory=dict)
    nested: bool = False
    asked: set[str] = field(default_factory=set)

    def error(self, text: str) -> ConfigError:
        """Return an error of this config.json."""
        return ConfigError(f"{self.origin}: {text}")

    def name(self, key: str) -> str:
        """Return what the family calls a key."""
        return self.family.keys.get(key, key)

    def get(self, key: str) -> Any:
        """Return what a key says; None where it is left out."""
        self.asked.add(key)
        return self.config.get(key)

    def number(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """Return the first of some keys that is set; a list of one number again and again is that number.

        Args:
            keys: names of it.
            default: where none is set; where this is 0, a key may say 0, too.
            least: it can be.

        Raises:
            ConfigError: none is set, and there is no default; or one is no whole number, or out of range.
        """
        self.asked.update(keys)
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, list) and value and all(each == value[0] for each in value):
                value = value[0]
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.error(f"{self.name(key)!r} must be a whole number, not {short(value)}.")
            if default == 0 and value == 0:
                continue
            if not least <= value <= MOST:
                raise self.error(f"{self.name(key)!r} must be from {least} to {MOST}, not {short(value)}.")
            return value
        if default is not None:
            return default
        usual = class_defaults(self.config["model_type"]) if self.nested else {}
        for name in map(self.name, keys):
            if isinstance(usual.get(name), int):
                return int(usual[name])
        raise self.error(f"has no whole number {self.name(keys[0])!r}, which its family's config.json has.")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether a key is set to true.

        Raises:
            ConfigError: it is neither true nor false.
        """
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{self.name(key)!r} must be true or false, not {short(value)}.")
        return value

    def names(self, key: str, count: int | None = None) -> list[str] | None:
        """Return a list, or None where there is none.

        Args:
            key: its name.
            count: layers, of which each must have an entry; None for any number.

        Raises:
            ConfigError: it is none, or has not one for each layer.
        """
        value = self.get(key)
        if value is None or value == []:
            return None
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.error(f"{key!r} must be a list, not {short(value)}.")
        if count is not None and len(value) < count:
            raise self.error(f"{key!r} must have an entry for each of the {count} layers, not {len(value)}.")
        return [str(entry) for entry in value[:count]]

    def unread(self) -> tuple[str, ...]:
        """Return the keys that may matter and were not asked for.

        Raises:
            ConfigError: one says something of the shape.
        """
        found = [f"architectures ({name})" for name in contradicting(self.config)]
        for config in (self.config, self.outside):
            for key, value in config.items():
                if (
                    (key in self.asked and config is self.config)
                    or not _says_something(value)
                    or HARMLESS.search(key)
                ):
                    continue
                if SHAPES.search(key) and not (config is self.outside and NEUTRAL.search(key)):
                    where = "beside the decoder's keys " if config is self.outside else ""
                    raise self.error(
                        f"{self.name(key)!r} {where}is not understood, and would change the model's shape; a model of "
                        "aiconfigurator-core (pip install 'vllm-sarathi[devices]'), named OWNER/MODEL, has measured "
                        "times."
                    )
                if not isinstance(value, bool) and not NEUTRAL.search(key):
                    found.append(self.name(key))
        return tuple(found)


def read_config(config: Mapping[str, Any], origin: str) -> Reader:
    """Return a config.json's decoder, ready to be read.

    Args:
        config: the whole file.
        origin: what errors call it.

    Raises:
        ConfigError: it is of no family that is understood.
    """
    if config.get("quantization") and not config.get("quantization_config"):
        raise ConfigError(
            f"{origin}: 'quantization' is how MLX states it, whose checkpoints vLLM does not serve; vLLM reads "
            "'quantization_config'."
        )
    decoder, outside = _decoder_of(config, origin)
    family = family_of(decoder, origin)
    translated = _flat(decoder, family, origin)
    for name, own in family.keys.items():
        if own in translated and translated.get(name) in (None, translated[own]):
            translated[name] = translated.pop(own)
    made = {**family.defaults, **translated}
    nested = any(config.get(key) is not None for key in INNER)
    return Reader(made, origin, family, outside, nested, {"model_type", "is_encoder_decoder", *OF_ALL})


@functools.cache
def class_defaults(model_type: str) -> Mapping[str, Any]:
    """Return what a configuration class of transformers takes for each key; empty where it has none."""
    # Imported here: most models do without.
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
    except ValueError:
        return {}
    return found


def _flat(decoder: Mapping[str, Any], family: Family, origin: str) -> dict[str, Any]:
    """Return a decoder's keys with those of its nested objects among them."""
    flat = dict(decoder)
    for name, keys in family.nested.items():
        inner = flat.pop(name, None)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{origin}: {name!r} must be an object, not {short(inner)}.")
        called = {own: key for key, own in keys.items()}
        for own, value in dict[str, Any](inner).items():
            key = called.get(own, own)
            if key not in ("model_type", *decoder):
                flat[key] = value
    return flat


def _decoder_of(config: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a config.json's decoder, with what the whole file says of its weights; and those around it."""
    key = next((key for key in INNER if config.get(key) is not None), None)
    if key is None:
        return dict(config), {}
    inner = config[key]
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{origin}: {key!r} must be an object, not {short(inner)}.")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{origin}: 'is_encoder_decoder' is set; only decoders are understood.")
    outside = {k: v for k, v in config.items() if k not in (*OF_ALL, *INNER, "model_type") and k not in inner}
    return {**{k: config[k] for k in OF_ALL if k in config}, **inner}, outside


def _says_something(value: Any) -> bool:
    """Return whether a key's value may change anything; texts name things."""
    return not isinstance(value, str) and value not in (None, False, 0, 0.0, [], {})


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names for a sentence; of many, the first."""
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
