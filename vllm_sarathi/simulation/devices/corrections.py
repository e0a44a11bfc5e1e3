"""What kernel tables leave out of a step, and by how much they are off: constants fitted on measured servers.

A step takes

    sum over families of operators  scale x time in the tables
    + layers x (what each layer launches beside those operators)
    + what is launched once a step

All constants were fitted by `benchmark.profile.silicon_fit` on the rows of the package's silicon sample whose id
ends in an even number; `vllm-sarathi validate --silicon` judges them on the others. Scales are held near 1 and
launches near 0 by the fit, so that a constant that the rows say little of stays where it would be without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.simulation.devices.graphs import BLACKWELL
from vllm_sarathi.simulation.devices.package import Spread

Parts = dict[str, float]
"""Seconds by family of operators."""

FAMILIES = ("gemm", "moe", "communication", "elementwise", "state")

STATE_WORDS = ("scan", "recurrence", "conv1d", "_ssm", "kda_fused")
"""In names of operators that carry the state of a linear attention or of Mamba."""

WHOLE_NORM = frozenset({"MiniMaxM2ForCausalLM"})
"""Architectures that normalise queries and keys over all heads at once: tensor parallel sums over devices for it."""

FITTED: Mapping[str, float] = {
    "attention blackwell": 1.045,
    "attention hopper": 1.053,
    "chunk_attention blackwell": 1.018,
    "chunk_attention hopper": 0.993,
    "communication blackwell": 0.9728,
    "communication hopper": 1.021,
    "elementwise blackwell": 0.9941,
    "elementwise hopper": 1.006,
    "expert_layer_us": 4.173,
    "gemm blackwell compressed-tensors": 1.0,
    "gemm blackwell fp8": 0.9298,
    "gemm blackwell fp8_block": 1.015,
    "gemm blackwell mxfp4": 0.9782,
    "gemm blackwell nvfp4": 1.089,
    "gemm hopper bfloat16": 0.9662,
    "gemm hopper compressed-tensors": 0.9996,
    "gemm hopper fp8": 0.9972,
    "gemm hopper fp8_block": 1.027,
    "gemm hopper mxfp4": 0.9795,
    "head_norm_us": 9.267,
    "host_sequence_us": 39.27,
    "host_us": 369.2,
    "latent b200_sxm": 1.075,
    "latent b300_sxm": 0.5415,
    "latent h200_sxm": 0.568,
    "moe blackwell compressed-tensors": 1.009,
    "moe blackwell fp8_block": 1.056,
    "moe blackwell mxfp4": 0.7421,
    "moe blackwell nvfp4": 1.003,
    "moe hopper compressed-tensors": 0.9822,
    "moe hopper fp8_block": 1.095,
    "moe hopper mxfp4": 0.9907,
    "mxfp8_layer_us": 5.111,
    "second_norm_us": 26.72,
    "shared_layer_us": 3.947,
    "whole_norm_us": 10.48,
}
"""Scales of families by device generation and precision, and microseconds of a layer or a step."""


def family(name: str) -> str:
    """Return the family of an operator that is no attention, by the package's name for it."""
    if name.endswith(("_moe", "moe_overlap")):
        return "moe"
    if name.endswith(("_ar", "_ar_1", "_ar_2", "_p2p", "allreduce", "dispatch")):
        return "communication"
    if name.endswith("_gemm"):
        return "gemm"
    if any(word in name for word in STATE_WORDS):
        return "state"
    return "elementwise"


@dataclass(frozen=True, slots=True)
class Place:
    """What the constants depend on.

    Attributes:
        generation: `hopper`, `blackwell` or `other`.
        system: the package's name of the device.
        precision: of the weights, as the package or the deployment's name says it.
        layers: of the model.
        tensor_parallel: devices that share a layer.
        experts: whether the model has any.
        latent: whether its attention is latent (MLA).
        head_norm: whether queries and keys are normalised.
        whole_norm: whether over all heads at once.
        two_norms: whether that sums over devices for queries and for keys, as vLLM before 0.18; else once for both.
    """

    generation: str
    system: str
    precision: str
    layers: int
    tensor_parallel: int
    experts: bool
    latent: bool
    head_norm: bool
    whole_norm: bool
    two_norms: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], system: str, spread: Spread) -> "Place":
        """Return it for a model as `package.read_config` reads it."""
        extra = config["extra_params"]
        extra = extra if isinstance(extra, Mapping) else {}
        blackwell, hopper = system.startswith(BLACKWELL), system.startswith(("h100", "h200"))
        return cls(
            "blackwell" if blackwell else "hopper" if hopper else "other",
            system,
            spread.precision or config["raw_config"].get("quant_algo") or "bfloat16",
            int(config["layers"]),
            spread.tensor_parallel,
            bool(config["num_experts"]),
            bool(extra.get("kv_lora_rank")),
            bool(extra.get("use_qk_norm")),
            config["architecture"] in WHOLE_NORM,
        )

    def scale_keys(self) -> dict[str, str]:
        """Return the name of the constant that scales each family."""
        attention = f"latent {self.system}" if self.latent else f"attention {self.generation}"
        return {
            "gemm": f"gemm {self.generation} {self.precision}",
            "moe": f"moe {self.generation} {self.precision}",
            "communication": f"communication {self.generation}",
            "elementwise": f"elementwise {self.generation}",
            "state": "state",
            "attention": attention,
            "chunk_attention": f"chunk_attention {self.generation}",
        }

    def launches(self) -> dict[str, float]:
        """Return how often a step launches what each constant in microseconds stands for."""
        layers, shared = float(self.layers), self.tensor_parallel > 1
        counts = {
            "step_us": 1.0,
            "shared_layer_us": layers * shared,
            "expert_layer_us": layers * self.experts,
            "head_norm_us": layers * self.head_norm,
            "whole_norm_us": layers * (self.whole_norm and shared),
            "second_norm_us": layers * (self.whole_norm and shared and self.two_norms),
        }
        if self.experts and self.precision == "mxfp4" and self.generation == "blackwell":
            counts["mxfp8_layer_us"] = layers
        return counts


@dataclass(frozen=True)
class Corrections:
    """The constants of one place.

    Attributes:
        scales: of each family, and of the two kinds of attention.
        step_s: what every step takes beside the operators in the tables.
        host_s, host_sequence_s: what the host takes for a step, and more for each of its sequences.
    """

    scales: Mapping[str, float]
    step_s: float
    host_s: float
    host_sequence_s: float

    def total_s(self, parts: Parts) -> float:
        """Return the seconds of a step's operators, all but its attention."""
        return self.step_s + sum(self.scales[name] * seconds for name, seconds in parts.items())


def corrections_for(place: Place, fitted: Mapping[str, float] | None = None) -> Corrections:
    """Return the constants of a place; `fitted` is FITTED unless others are tried."""
    known = FITTED if fitted is None else fitted

    def total_s(counts: Mapping[str, float]) -> float:
        return sum(known.get(key, 0.0) * count for key, count in counts.items()) / 1e6

    return Corrections(
        scales={name: known.get(key, 1.0) for name, key in place.scale_keys().items()},
        step_s=total_s(place.launches()),
        host_s=total_s({"host_us": 1.0}),
        host_sequence_s=total_s({"host_sequence_us": 1.0}),
    )
