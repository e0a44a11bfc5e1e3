"""A model on devices: its memory, its step times, and where they come from."""

import functools
import math
from dataclasses import dataclass, field

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.engine.vllm.internals import engine_args_class
from vllm_sarathi.simulation.calibrated import CalibratedTimes, Ratios, StepModel
from vllm_sarathi.simulation.devices.measured import Kernels, MeasuredTimes
from vllm_sarathi.simulation.devices.roofline import Device, Roofline
from vllm_sarathi.simulation.devices.source import Source
from vllm_sarathi.simulation.models import ModelShape
from vllm_sarathi.simulation.simulator import StepTimes

RESERVED_BYTES = 3e9
"""Activations of the largest step, captured graphs and the device's own context, per device."""

CPU_KV_CACHE_GIB = 4
CPU = Device(math.nan, math.nan, CPU_KV_CACHE_GIB * 2**30, math.nan, math.nan, default_sequences=128)
"""A CPU has no data sheet here: nothing but its memory for the KV cache, and vLLM's defaults, is stated."""

CPU_MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB for the KV cache, as `vllm serve` reads it."""


@functools.cache
def memory_share() -> float:
    """Return the share of a device's memory that vLLM takes by default, which differs between its versions."""
    return float(engine_args_class().gpu_memory_utilization)


class DoesNotFit(ConfigError):
    """Devices that cannot hold a model, or that cannot share it."""


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        name: as the user wrote it.
        unit: each of the devices.
        tensor_parallel, stages: how the model is spread.
        max_tokens: the longest request, tokens.
        max_sequences: the most requests in a step.
        step_tokens: vLLM's default for the tokens of a step there.
    """

    name: str
    unit: Device
    tensor_parallel: int
    stages: int
    max_tokens: int
    max_sequences: int
    step_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            DoesNotFit: too few for one request, with the arithmetic.
        """
        raise NotImplementedError

    @property
    def kv_token_bytes(self) -> float:
        """What one token of a long request takes in the KV cache, over all devices."""
        raise NotImplementedError

    @property
    def source(self) -> Source:
        """Where the step times come from."""
        raise NotImplementedError

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take; `seed` is for what scatters."""
        raise NotImplementedError

    def prefill_s(self, tokens: float) -> float:
        """Return the seconds to prefill a prompt of `tokens` with nothing beside it."""
        count = max(1, round(tokens))
        return self.times().stage_s(StepShape(count, 0, 0, chunk_work(0, count), 1), 0)

    @property
    def in_flight(self) -> int:
        """Batches in flight, as vLLM does it by default: asynchronous on one stage, else one per stage."""
        return 2 if self.stages == 1 else self.stages


@dataclass(frozen=True)
class RooflineDeployment(Deployment):
    """A model on devices of which there is a data sheet.

    Attributes:
        model: the model's shape.
        devices_per_node: devices in one machine.
        expert_parallel: whether experts are distributed whole.
        notes: why nothing better was to be had; sentences.
    """

    model: ModelShape
    devices_per_node: int = 8
    expert_parallel: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            DoesNotFit: the model does not fit, with the arithmetic.
        """
        devices, share = self.tensor_parallel * self.stages, memory_share()
        weights = self.model.weight_bytes / devices
        whole = self._request_bytes(self.max_tokens)
        room = share * self.unit.memory_bytes - weights - RESERVED_BYTES
        tokens = int(room / whole * self.max_tokens) if room > 0 else 0
        if tokens < self.max_tokens:
            raise DoesNotFit(
                f"--deployment {self.name}: does not fit: {share:.0%} of {self.unit.memory_bytes / 1e9:.0f} GB "
                f"per device less {weights / 1e9:.1f} GB of weights ({self.model.parameters / 1e9:.1f}e9 parameters "
                f"over {devices}) less {RESERVED_BYTES / 1e9:.0f} GB reserved leaves {room / 1e9:.1f} GB of KV cache, "
                f"and one request of {self.max_tokens} tokens needs {whole / 1e9:.1f} GB; "
                "spread it over more devices (MODEL/DEVICE:tp2pp2)."
            )
        return tokens

    def _request_bytes(self, tokens: int) -> float:
        """Return what one request takes of a device's KV cache, the states of linear attention among it."""
        states = self.model.state_bytes / self.tensor_parallel
        return (self.model.kv_bytes(tokens, self.tensor_parallel) + states) / self.stages

    @property
    def kv_token_bytes(self) -> float:
        """What one token of a long request takes in the KV cache, over all devices."""
        return self._request_bytes(self.max_tokens) / self.max_tokens * self.tensor_parallel * self.stages

    @property
    def source(self) -> Source:
        """Where the step times come from."""
        return Source("roofline", "from the device's data sheet and the model's shape", self.notes)

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take."""
        return Roofline(
            self.model,
            self.unit,
            self.tensor_parallel,
            self.stages,
            self.devices_per_node,
            self.expert_parallel,
        )


@dataclass(frozen=True)
class MeasuredDeployment(Deployment):
    """A model on devices on which its kernels have been measured.

    Attributes:
        kernels: their times.
    """

    kernels: Kernels

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            DoesNotFit: the model does not fit, with the arithmetic.
        """
        memory, capacity = self.kernels.memory, self.unit.memory_bytes
        room = memory_share() * capacity - memory.weights - memory.other
        tokens = memory.tokens_in(room) if room > 0 else 0
        if tokens >= self.max_tokens:
            return int(tokens)
        raise DoesNotFit(
            f"--deployment {self.name}: does not fit: {memory_share():.0%} of {capacity / 1e9:.0f} GB per device "
            f"less {memory.weights / 1e9:.1f} GB of weights less {memory.other / 1e9:.1f} GB for activations and "
            f"communication leaves {room / 1e9:.1f} GB of KV cache, and one request of {self.max_tokens} tokens "
            f"needs {self.max_tokens * memory.kv_token / 1e9:.1f} GB; spread it over more devices "
            "(MODEL/DEVICE:tp2pp2)."
        )

    @property
    def kv_token_bytes(self) -> float:
        """What one token of a long request takes in the KV cache, over all devices."""
        return self.kernels.memory.kv_token * self.tensor_parallel * self.stages

    @property
    def source(self) -> Source:
        """Where the step times come from."""
        return self.kernels.source

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take."""
        return MeasuredTimes(self.kernels, self.stages)


@dataclass(frozen=True)
class CalibratedDeployment(Deployment):
    """A model on a CPU that has been measured.

    Attributes:
        model: the model's shape.
        step_model: how long its steps take.
        step_ratios: how they scatter.
    """

    model: ModelShape
    step_model: StepModel
    step_ratios: Ratios

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            DoesNotFit: too few for one request, with the arithmetic.
        """
        room, token = self.unit.memory_bytes, self.model.kv_bytes_per_token
        if room < self.max_tokens * token:
            raise DoesNotFit(
                f"--deployment {self.name}: does not fit: {CPU_MEMORY_VARIABLE} is {room / 2**30:.0f} GiB, and one "
                f"request of {self.max_tokens} tokens needs {self.max_tokens * token / 2**30:.1f} GiB of KV cache."
            )
        return int(room / token)

    @property
    def kv_token_bytes(self) -> float:
        """What one token of a long request takes in the KV cache, over all devices."""
        return self.model.kv_bytes_per_token

    @property
    def source(self) -> Source:
        """Where the step times come from."""
        return Source("calibrated", "steps that were measured on this machine")

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take; `seed` is for what scatters."""
        return CalibratedTimes(self.step_model, self.step_ratios, seed)

    @property
    def in_flight(self) -> int:
        """One batch: vLLM schedules synchronously on a CPU."""
        return 1
