"""The longest sequence that vLLM serves by default, by `_get_and_verify_max_len` in its `vllm.config.model`."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_sarathi.core.errors import short
from vllm_sarathi.simulation.config_reader import Reader

LONGER_ALREADY = ("llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of scaling that `max_position_embeddings` has in it."""

SHORT_BY_DEFAULT = ("longrope", "su")
"""Kinds that cost quality in short sequences, so that vLLM serves what the model had before."""


def longest_sequence(read: Reader) -> int:
    """Return the longest sequence in tokens.

    Raises:
        ConfigError: a key is not understood.
    """
    longest, factor = read.number("max_position_embeddings"), 1.0
    before = read.number("original_max_position_embeddings", default=longest)
    for rope in _ropes(read):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in SHORT_BY_DEFAULT:
            return before
        stated = rope.get("factor")
        if stated is None or kind in LONGER_ALREADY or "gemma3" in str(read.config.get("model_type")):
            continue
        if isinstance(stated, bool) or not isinstance(stated, int | float) or not 1 <= stated <= 1e6:
            raise read.error(f"the factor of its 'rope_scaling' must be from 1 to 1e6, not {short(stated)}.")
        factor = stated
    return int(longest * factor)


def _ropes(read: Reader) -> Iterator[Mapping[str, Any]]:
    """Yield what is said of the rotary embeddings: once, or for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        said = read.get(key)
        if said is None:
            continue
        if not isinstance(said, Mapping):
            raise read.error(f"{key!r} must be an object, not {short(said)}.")
        nested = [part for part in said.values() if isinstance(part, Mapping)]
        yield from nested or [said]
        return
