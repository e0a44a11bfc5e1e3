"""Which tensor parallelism cuts the blocks of a checkpoint in block-scaled FP8, and is refused by vLLM for it.

Its weights have a scale for each block, mostly of 128 outputs and 128 inputs. A device can have whole blocks alone:
`validate_fp8_block_shape` and `validate_fp8_block_shape_moe` in vLLM's `quantization.utils.fp8_utils`. Projections
that vLLM joins into one (queries with keys and values, gate with up) may be cut all the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_sarathi.simulation.checkpoint_modules import names_of
from vllm_sarathi.simulation.config_reader import Reader
from vllm_sarathi.simulation.config_states import element_bytes
from vllm_sarathi.simulation.layers import LayerKind
from vllm_sarathi.simulation.quantization import Stated, scheme_of, stated

FINEST = 32
"""The smallest blocks into which vLLM cuts those of experts (`refine_fp8_moe_block_shape` in its `oracle.fp8`)."""

UNCUT = ("deepseek_v4", "step3p7")
"""Families of which nothing is refused: vLLM fills up what a device has of the first one's projections; of the second,
there is a config.json alone that leaves out which modules are not quantized."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What devices share of a checkpoint in block-scaled FP8.

    Attributes:
        outputs, inputs: that have a scale together.
        shares: projections by name, how many numbers of it the devices share, and how many are a block's.
        experts: width and inputs of its experts; None where they are not quantized.
        finer: whether vLLM can take finer blocks for experts: of the method `fp8`.
    """

    outputs: int
    inputs: int
    shares: tuple[tuple[str, int, int], ...]
    experts: tuple[int, int] | None
    finer: bool

    def cut(self, ways: int, whole_experts: bool) -> str | None:
        """Return what devices that share a layer would cut, with the arithmetic; None where all blocks stay whole.

        Args:
            ways: devices.
            whole_experts: whether experts are distributed whole.
        """
        for name, size, block in self.shares if ways > 1 else ():
            if size % (ways * block):
                return f"{name} has {size} / {ways} = {size / ways:g} on each device, no multiple of {block}"
        if self.experts is None:
            return None
        width, inputs = self.experts
        parts = 1 if whole_experts else ways
        finest = math.gcd(self.outputs, self.inputs, width // parts, inputs)
        blocks = math.lcm(self.outputs, self.inputs if ways > 1 else 1)
        if width % parts == 0 and (width // parts % blocks == 0 or (self.finer and finest >= FINEST)):
            return None
        finer = f", nor of {FINEST}, the smallest that vLLM cuts them into" if self.finer else ""
        return f"an expert has {width} / {parts} = {width / parts:g} on each device, no multiple of {blocks}{finer}"


def blocks_of(read: Reader, layers: Sequence[LayerKind]) -> Blocks | None:
    """Return what devices share of a checkpoint in block-scaled FP8; None of another.

    Args:
        read: its config.json.
        layers: in order.
    """
    said = stated(read.config, read.origin)
    size = None if said is None else _block_size(said)
    if said is None or size is None or read.config["model_type"] in UNCUT:
        return None
    outputs, inputs = size
    plain = element_bytes(read)
    scheme = scheme_of(said, plain)
    shares: dict[tuple[str, int, int], None] = {}
    experts = None
    for index, layer in enumerate(layers):
        beside = bool(layer.experts and layer.mlp_parameters)
        for kind, projection, numbers, by_outputs in _shared(read, layer):
            if numbers and scheme.bytes_of(index, names_of(kind, projection, beside)) < plain:
                shares[projection, numbers, outputs if by_outputs else inputs] = None
        one = layer.experts
        if one and scheme.bytes_of(index, names_of("experts", "down_proj", beside)) < plain:
            experts = one.width, one.parameters // (read.family.matrices * one.width)
    return Blocks(outputs, inputs, tuple(shares), experts, finer=said.said.get("quant_method") == "fp8")


def _block_size(said: Stated) -> tuple[int, int] | None:
    """Return the outputs and inputs of a block; None where scales are not of blocks."""
    groups = said.part("config_groups")
    each = [groups.part(name) for name in groups.said] if groups else []
    weights = [group.part("weights") for group in each if group]
    sizes = [
        said.said.get("weight_block_size"),
        *(part.said.get("block_structure") for part in weights if part),
    ]
    size = next((size for size in sizes if size), None)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise said.error("weight_block_size", "must be two whole numbers above 0.")
    return size[0], size[1]


def _shared(read: Reader, layer: LayerKind) -> Iterator[tuple[str, str, int, bool]]:
    """Yield what devices share of a layer: what it is of, a projection, how many numbers, whether of its outputs."""
    hidden, matrices = read.number("hidden_size"), read.family.matrices
    if layer.attention:
        sizes = dict(layer.attention.projections)
        yield "attention", "o_proj", sizes["o_proj"] // hidden, False
        if read.number("kv_lora_rank", default=0):
            heads, nope = read.number("num_attention_heads"), read.number("qk_nope_head_dim")
            queries = "q_b_proj" if "q_b_proj" in sizes else "q_proj"
            yield "attention", queries, heads * (nope + read.number("qk_rope_head_dim")), True
            yield "attention", "kv_b_proj", heads * (nope + read.number("v_head_dim")), True
    if layer.state:
        yield "state", "out_proj", dict(layer.state.projections).get("out_proj", 0) // hidden, False
    width = layer.mlp_parameters // (matrices * hidden)
    yield "mlp", "down_proj", width, False
    if not read.family.gated:
        yield "mlp", "up_proj", width, True
    if layer.experts:
        yield "shared", "down_proj", layer.experts.shared_width, False
