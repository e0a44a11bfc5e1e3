"""How long a device takes for the parts of a step: a roofline over published figures.

    linear layers   max(padded tokens x 2 weights / compute, weights / bandwidth)
    prefill         4 x heads x head_dim x (token pairs) / compute, at least the reading of the prefix
    decode          KV bytes read / bandwidth
    all the rest    activations written and read again, kernels launched one after another

Peaks are the makers' data sheets (dense, no sparsity). What share of a peak real kernels reach differs little among
devices of this kind, so each share is one constant, taken from published measurements and never from the figures that
we compare with:

- COMPUTE_SHARE: large bfloat16 matrix products reach 75-80% of an A100's peak with cuBLAS (Megatron-LM,
  arXiv 2104.04473, has 52% end to end over whole training steps with all else in them; PaLM's appendix B defines the
  ratio); 0.75.
- ATTENTION_SHARE: FlashAttention-2, causal, forward, head dimension 128, 2k to 16k tokens: 170-190 of 312 TFLOP/s
  on an A100 (arXiv 2307.08691, figure 5); 0.55.
- BANDWIDTH_SHARE: streaming kernels reach 85-90% of the bandwidth on a data sheet (BabelStream on A100: 1.75 of
  2.04 TB/s); 0.85.
- KV_SHARE: paged decode attention reads its blocks less evenly (FlashInfer, arXiv 2501.01005, section 4); 0.7.
- LINK_SHARE: NCCL's bus bandwidth over NVLink, about 230 of 300 GB/s each way on an A100; 0.75.
"""

import math
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.devices.host import HOST_S
from vllm_sarathi.simulation.models import ModelShape
from vllm_sarathi.simulation.quantization import Precision

COMPUTE_SHARE = 0.75
ATTENTION_SHARE = 0.55
BANDWIDTH_SHARE = 0.85
KV_SHARE = 0.7
LINK_SHARE = 0.75

KERNELS_PER_LAYER = 9
"""Two norms, QKV, rotary and cache write, attention, output, gate-up, activation, down."""

LAYER_S = 12e-6
EXPERT_LAYER_S = 35e-6
SHARED_LAYER_S, DOUBLING_LAYER_S = 5e-6, 6e-6
"""What a layer takes beyond all that: small kernels, the routing of tokens to experts, and the waiting of devices for
one another, once and for each doubling of them. Fitted by least squares of the relative error on the rows of
aiconfigurator-core's silicon sample whose id ends in an even number (asynchronous servers, H100, H200, B200, B300)."""

ACTIVATION_PASSES = 12
"""How often a token's residual stream is written or read in one layer beside the matrix products."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, by its data sheet.

    Attributes:
        flops_per_s: peak, bfloat16, dense.
        bytes_per_s: memory bandwidth.
        memory_bytes: memory, as CUDA reports it.
        link_bytes_per_s: bandwidth to its peers in the same machine, each way.
        link_latency_s: an all-reduce of a few bytes.
        kernel_s: least time of a kernel inside a captured graph.
        fp8_speed, fp4_speed: how many times as quick products in 8 and in 4 bits are; 1 where weights are widened.
        tile_tokens: rows of a matrix product's tile: tokens are computed in whole tiles.
        default_step_tokens, default_sequences: vLLM's own defaults for `max_num_batched_tokens` (of the server) and
            `max_num_seqs` on this device.
    """

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    link_latency_s: float
    kernel_s: float = 2e-6
    tile_tokens: int = 128
    fp8_speed: float = 1.0
    fp4_speed: float = 1.0
    default_step_tokens: int = 2048
    default_sequences: int = 256

    def speed_up(self, precision: Precision) -> float:
        """Return how many times as quick the products are as in bfloat16."""
        width = min(precision.mlp, precision.experts)
        if precision.widened or width > 1.1:
            return 1.0
        return self.fp8_speed if width >= 1 else self.fp4_speed


GIB = 2**30

HOPPER: dict[str, Any] = {"default_step_tokens": 8192, "default_sequences": 1024, "fp8_speed": 2.0}
BLACKWELL: dict[str, Any] = {
    "default_step_tokens": 16384,
    "default_sequences": 1024,
    "fp8_speed": 2.0,
    "fp4_speed": 4.0,
}

DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 2.039e12, 79.2 * GIB, 300e9, 12e-6),
    "a40": Device(149.7e12, 0.696e12, 44.4 * GIB, 32e9, 30e-6),
    "h100": Device(989e12, 3.35e12, 79.1 * GIB, 450e9, 10e-6, **HOPPER),
    "h200": Device(989e12, 4.8e12, 139.8 * GIB, 450e9, 10e-6, **HOPPER),
    "l4": Device(121e12, 0.3e12, 22.0 * GIB, 32e9, 30e-6, fp8_speed=2.0),
    "b200": Device(2250e12, 8e12, 178.4 * GIB, 900e9, 10e-6, **BLACKWELL),
    "b300": Device(2250e12, 8e12, 267.7 * GIB, 900e9, 10e-6, **BLACKWELL),
}
"""By name: A100-SXM-80GB, A40 (PCIe 4.0 between pairs), H100-SXM, H200-SXM, L4, B200, B300 (both HGX). Of the memory
on a data sheet, which is in GiB, CUDA reports a hundredth less, and less again where error correction takes some (A40,
L4): it is what vLLM takes its share of, and what an out-of-memory message calls the total capacity (79.11 GiB for an
H100: vllm-project/vllm issue 27508). Measured deployments have it from here, too."""

ETHERNET_BYTES_PER_S = 12.5e9
"""100 Gbit/s between machines, as between the two of the paper's Falcon-180B."""

ETHERNET_LATENCY_S = 60e-6


def device(name: str) -> Device:
    """Return a device by name.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    if name.lower() not in DEVICES:
        raise ConfigError(f"--deployment: unknown device {name!r}; {nearest_hint(name, (*DEVICES, 'cpu'))}")
    return DEVICES[name.lower()]


class Roofline:
    """Step times of a model that is spread over devices.

    Args:
        shape: the model.
        unit: each of the devices.
        tensor_parallel: devices that share each layer.
        stages: pipeline stages that share the layers.
        devices_per_node: devices in one machine; what goes beyond crosses the network between machines.
        expert_parallel: whether the devices that share a layer have whole experts. Either way vLLM sums up what they
            computed; but then the busiest of them is waited for.
    """

    def __init__(
        self,
        shape: ModelShape,
        unit: Device,
        tensor_parallel: int = 1,
        stages: int = 1,
        devices_per_node: int = 8,
        expert_parallel: bool = False,
    ) -> None:
        self.stages = stages
        self.host_s = HOST_S
        self.host_sequence_s = 0.0
        self._shape = shape
        self._tile = unit.tile_tokens
        ways = tensor_parallel * stages
        layers = shape.layers / stages
        bandwidth = unit.bytes_per_s * BANDWIDTH_SHARE
        # The embedding's product with the last tokens is small; it is spread over the stages.
        weights = sum(kind.count * shape.dense_bytes(kind) for kind in shape.kinds)
        self._dense_floor_s = (weights + shape.vocab * shape.hidden * shape.precision.rest) / ways / bandwidth
        self._expert_kinds = tuple(
            (kind.experts, kind.count * shape.expert_bytes(kind) / kind.experts.count / ways / bandwidth)
            for kind in shape.kinds
            if kind.experts
        )
        self._floors: dict[int, float] = {}
        self._dealt = tensor_parallel if expert_parallel else 1
        flops = 2 * (shape.active_parameters - shape.embedding_parameters) / ways
        flops += (
            2
            / ways
            * sum(
                kind.count
                * kind.experts.active
                * kind.experts.parameters
                * (kind.experts.busiest(shape.skew, self._dealt) - 1)
                for kind in shape.kinds
                if kind.experts
            )
        )
        self._linear_token_s = flops / (unit.flops_per_s * COMPUTE_SHARE * unit.speed_up(shape.precision))
        self._attention(unit, tensor_parallel, stages)
        width = ACTIVATION_PASSES * shape.hidden + 3 * shape.intermediate / tensor_parallel
        activation_bytes = layers * shape.dtype_bytes * width
        self._activation_token_s = activation_bytes / bandwidth
        self._fixed_s = layers * (KERNELS_PER_LAYER * unit.kernel_s + LAYER_S)
        expert_layers = sum(kind.count for kind in shape.kinds if kind.experts) / stages
        self._fixed_s += expert_layers * EXPERT_LAYER_S
        token_bytes = shape.hidden * shape.dtype_bytes
        if tensor_parallel > 1:
            across = tensor_parallel > devices_per_node
            link = ETHERNET_BYTES_PER_S if across else unit.link_bytes_per_s
            ring = 2 * (tensor_parallel - 1) / tensor_parallel
            self._fixed_s += 2 * layers * (ETHERNET_LATENCY_S if across else unit.link_latency_s)
            self._fixed_s += layers * (SHARED_LAYER_S + DOUBLING_LAYER_S * math.log2(tensor_parallel))
            self._activation_token_s += 2 * layers * ring * token_bytes / (link * LINK_SHARE)
        across = tensor_parallel * stages > devices_per_node
        self._send_fixed_s = ETHERNET_LATENCY_S if across else unit.link_latency_s
        link = ETHERNET_BYTES_PER_S if across else unit.link_bytes_per_s
        self._send_token_s = token_bytes / (link * LINK_SHARE)

    def _attention(self, unit: Device, tensor_parallel: int, stages: int) -> None:
        """Set what pairs of tokens and what the KV cache takes: of layers that see all, and by how far others do."""
        shape = self._shape
        flops_per_s, bytes_per_s = unit.flops_per_s * ATTENTION_SHARE, unit.bytes_per_s * KV_SHARE
        self._pair_s = self._kv_token_s = 0.0
        self._windows: list[tuple[int, float, float]] = []
        for kind, attention in [(each, part) for each in shape.kinds for part in each.attentions]:
            pair_s = kind.count * attention.pair_flops / tensor_parallel / stages / flops_per_s
            share = max(1.0, attention.kv_heads / tensor_parallel) / attention.kv_heads
            token_bytes = kind.count * shape.kv_token_bytes(attention)
            kv_token_s = token_bytes / stages * share / bytes_per_s
            limits = [limit for limit in (attention.window, attention.reach) if limit is not None]
            if limits:
                self._windows.append((min(limits), pair_s, kv_token_s))
            else:
                self._pair_s += pair_s
                self._kv_token_s += kv_token_s
        # A state is read and written for each sequence.
        self._sequence_s = 2 * shape.state_bytes / tensor_parallel / stages / bytes_per_s

    def _floor_s(self, tokens: int) -> float:
        """Return the seconds that the weights' own reading takes; experts are read as they are woken."""
        if not self._expert_kinds:
            return self._dense_floor_s
        seconds = self._floors.get(tokens)
        if seconds is None:
            skew, dealt = self._shape.skew, self._dealt
            seconds = self._dense_floor_s + sum(
                experts.touched(tokens, skew, dealt) * expert_s for experts, expert_s in self._expert_kinds
            )
            self._floors[tokens] = seconds
        return seconds

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that each stage works on a batch; see `simulator.StepTimes`."""
        padded = math.ceil(shape.tokens / self._tile) * self._tile
        seconds = (
            self._fixed_s
            + max(self._floor_s(shape.tokens), self._linear_token_s * padded)
            + self._activation_token_s * shape.tokens
            + self._sequence_s * shape.sequences
            + self._kv_token_s * shape.decode_context_tokens
            + max(self._pair_s * shape.prefill_work, self._kv_token_s * prefix_tokens)
        )
        for window, pair_s, kv_token_s in self._windows:
            prompt_tokens = shape.tokens - shape.decodes
            pairs = min(shape.prefill_work, prompt_tokens * window)
            read = min(shape.decode_context_tokens, shape.decodes * window)
            seconds += kv_token_s * read + pair_s * pairs
        return seconds

    def send_s(self, tokens: int) -> float:
        """Return the seconds to send a batch's activations to the next stage."""
        return self._send_fixed_s + self._send_token_s * tokens
