"""Layers that keep a state of a sequence, out of a config.json: Mamba, linear attention, short convolutions.

vLLM keeps a state in the model's own type, unless the family or its config.json asks for 32 bits.
"""

import math
from collections.abc import Callable, Mapping

from vllm_sarathi.core.errors import short
from vllm_sarathi.simulation.config_reader import Reader
from vllm_sarathi.simulation.layers import State, gated_delta, kimi_delta, mamba1, mamba2, short_convolution

DTYPE_BYTES = {"float32": 2, "float16": 2, "bfloat16": 2}
"""Bytes of an element as vLLM loads it by default: what a checkpoint has in float32 it casts to 16 bits."""

STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def element_bytes(read: Reader) -> int:
    """Return the bytes of an element that is not quantized, as vLLM has it by default.

    Raises:
        ConfigError: a type that is none of DTYPE_BYTES.
    """
    for key in ("torch_dtype", "dtype"):
        said = read.config.get(key)
        if said is not None:
            name = str(said).removeprefix("torch.")
            if name not in DTYPE_BYTES:
                raise read.error(f"{key!r} is {short(said)}; known are {', '.join(DTYPE_BYTES)}.")
            return DTYPE_BYTES[name]
    return 2


def read_state(read: Reader, element_bytes: int) -> State:
    """Return what the layers of a family without attention have in its place.

    Args:
        read: the config.json.
        element_bytes: of an element of the model, as vLLM loads it.

    Raises:
        ConfigError: the family has no such layers, or a key is missing or wrong.
    """
    maker = MAKERS.get(read.family.state)
    if maker is None:
        raise read.error(
            "'layer_types' has layers without attention, which are not understood of its 'model_type'."
        )
    return maker(read, element_bytes)


def _state_bytes(read: Reader, element_bytes: int) -> int:
    """Return the bytes of an element of the state."""
    key = read.family.state_type
    said = None if key is None else read.get(key)
    if said is None:
        return element_bytes
    if not isinstance(said, str) or said not in STATE_BYTES:
        raise read.error(f"{key!r} is {short(said)}; known are {', '.join(STATE_BYTES)}.")
    return STATE_BYTES[said]


def _gated_delta(read: Reader, element_bytes: int) -> State:
    return gated_delta(
        read.number("hidden_size"),
        read.number("linear_num_key_heads"),
        read.number("linear_num_value_heads"),
        read.number("linear_key_head_dim"),
        read.number("linear_value_head_dim"),
        read.number("linear_conv_kernel_dim"),
        element_bytes,
        _state_bytes(read, element_bytes),
    )


def _kimi_delta(read: Reader, element_bytes: int) -> State:
    return kimi_delta(
        read.number("hidden_size"),
        read.number("linear_num_heads"),
        read.number("linear_head_dim"),
        read.number("linear_conv_kernel_dim"),
        element_bytes,
    )


def _mamba1(read: Reader, element_bytes: int) -> State:
    hidden = read.number("hidden_size")
    inner = _expansion(read) * hidden
    for key in ("d_inner", "d_model", "n_layer"):  # the same again, in the first of them
        read.get(key)
    stated = read.get("time_step_rank") not in (None, "auto")
    rank = read.number("time_step_rank") if stated else math.ceil(hidden / 16)
    return mamba1(
        hidden, inner, read.number("ssm_state_size"), read.number("conv_kernel"), rank, element_bytes
    )


def _mamba2(read: Reader, element_bytes: int) -> State:
    hidden, heads = read.number("hidden_size"), read.number("mamba_num_heads")
    if read.get("mamba_head_dim") in (None, "auto"):
        inner = read.number("mamba_d_ssm", default=_expansion(read) * hidden)
        if inner % heads:
            raise read.error(
                f"{read.name('mamba_num_heads')!r} is {heads}, which do not divide a width of {inner} evenly."
            )
        head_dim = inner // heads
    else:
        head_dim = read.number("mamba_head_dim")
    for key in (
        "mamba_d_ssm",
        "mamba_expand",
        "mamba_use_mlp",
        "mlp_expansion_factor",
    ):  # said by others, too
        read.get(key)
    return mamba2(
        hidden,
        heads,
        head_dim,
        read.number("n_groups"),
        read.number("ssm_state_size"),
        read.number("conv_kernel"),
        element_bytes,
        _state_bytes(read, element_bytes),
    )


def _expansion(read: Reader) -> int:
    return read.number("mamba_expand", default=2)


def _short_convolution(read: Reader, element_bytes: int) -> State:
    hidden = read.number("hidden_size")
    read.get("num_heads")  # those of its attention, again
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        width = read.number(key, default=hidden)
        if width != hidden:
            raise read.error(f"{key!r} is {width}, which is not understood beside a width of {hidden}.")
    return short_convolution(hidden, read.number("conv_L_cache"), element_bytes)


MAKERS: Mapping[str, Callable[[Reader, int], State]] = {
    "gated_delta": _gated_delta,
    "kimi_delta": _kimi_delta,
    "mamba1": _mamba1,
    "mamba2": _mamba2,
    "short_convolution": _short_convolution,
}
"""By what `Family.state` says."""
