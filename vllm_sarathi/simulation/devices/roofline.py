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

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.devices.host import HOST_S
from vllm_sarathi.simulation.models import ModelShape

COMPUTE_SHARE = 0.75
ATTENTION_SHARE = 0.55
BANDWIDTH_SHARE = 0.85
KV_SHARE = 0.7
LINK_SHARE = 0.75

KERNELS_PER_LAYER = 9
"""Two norms, QKV, rotary and cache write, attention, output, gate-up, activation, down."""

ACTIVATION_PASSES = 12
"""How often a token's residual stream is written or read in one layer beside the matrix products."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, by its data sheet.

    Attributes:
        flops_per_s: peak, bfloat16, dense.
        bytes_per_s: memory bandwidth.
        memory_bytes: memory.
        link_bytes_per_s: bandwidth to its peers in the same machine, each way.
        link_latency_s: an all-reduce of a few bytes.
        kernel_s: least time of a kernel inside a captured graph.
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
    default_step_tokens: int = 2048
    default_sequences: int = 256


DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 2.039e12, 80e9, 300e9, 12e-6),
    "a40": Device(149.7e12, 0.696e12, 48e9, 32e9, 30e-6),
    "h100": Device(989e12, 3.35e12, 80e9, 450e9, 10e-6, default_step_tokens=8192, default_sequences=1024),
    "h200": Device(989e12, 4.8e12, 141e9, 450e9, 10e-6, default_step_tokens=8192, default_sequences=1024),
    "l4": Device(121e12, 0.3e12, 24e9, 32e9, 30e-6),
    "b200": Device(2250e12, 8e12, 180e9, 900e9, 10e-6, default_step_tokens=16384, default_sequences=1024),
}
"""By name: A100-SXM-80GB, A40 (PCIe 4.0 between pairs), H100-SXM, H200-SXM, L4, B200."""

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
    """

    def __init__(
        self,
        shape: ModelShape,
        unit: Device,
        tensor_parallel: int = 1,
        stages: int = 1,
        devices_per_node: int = 8,
    ) -> None:
        self.stages = stages
        self.host_s = HOST_S
        self.host_sequence_s = 0.0
        self._tile = unit.tile_tokens
        layers = shape.layers / stages
        # The embedding's product with the last tokens is small; it is spread over the stages.
        weights = (layers * shape.layer_parameters + shape.vocab * shape.hidden / stages) / tensor_parallel
        self._linear_floor_s = weights * shape.dtype_bytes / (unit.bytes_per_s * BANDWIDTH_SHARE)
        flops = 2 * layers * shape.layer_parameters / tensor_parallel
        self._linear_token_s = flops / (unit.flops_per_s * COMPUTE_SHARE)
        pair_flops = 4 * layers * shape.heads * shape.head_dim / tensor_parallel
        self._pair_s = pair_flops / (unit.flops_per_s * ATTENTION_SHARE)
        share = max(1.0, shape.kv_heads / tensor_parallel) / shape.kv_heads
        kv_bytes = shape.kv_bytes_per_token / stages * share
        self._kv_token_s = kv_bytes / (unit.bytes_per_s * KV_SHARE)
        width = ACTIVATION_PASSES * shape.hidden + 3 * shape.intermediate / tensor_parallel
        activation_bytes = layers * shape.dtype_bytes * width
        self._activation_token_s = activation_bytes / (unit.bytes_per_s * BANDWIDTH_SHARE)
        self._fixed_s = layers * KERNELS_PER_LAYER * unit.kernel_s
        token_bytes = shape.hidden * shape.dtype_bytes
        if tensor_parallel > 1:
            across = tensor_parallel > devices_per_node
            link = ETHERNET_BYTES_PER_S if across else unit.link_bytes_per_s
            ring = 2 * (tensor_parallel - 1) / tensor_parallel
            self._fixed_s += 2 * layers * (ETHERNET_LATENCY_S if across else unit.link_latency_s)
            self._activation_token_s += 2 * layers * ring * token_bytes / (link * LINK_SHARE)
        across = tensor_parallel * stages > devices_per_node
        self._send_fixed_s = ETHERNET_LATENCY_S if across else unit.link_latency_s
        link = ETHERNET_BYTES_PER_S if across else unit.link_bytes_per_s
        self._send_token_s = token_bytes / (link * LINK_SHARE)

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that each stage works on a batch; see `simulator.StepTimes`."""
        padded = math.ceil(shape.tokens / self._tile) * self._tile
        return (
            self._fixed_s
            + max(self._linear_floor_s, self._linear_token_s * padded)
            + self._activation_token_s * shape.tokens
            + self._kv_token_s * shape.decode_context_tokens
            + max(self._pair_s * shape.prefill_work, self._kv_token_s * prefix_tokens)
        )

    def send_s(self, tokens: int) -> float:
        """Return the seconds to send a batch's activations to the next stage."""
        return self._send_fixed_s + self._send_token_s * tokens
