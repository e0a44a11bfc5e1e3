"""A deployment: a model on devices, its memory, its step times, and a scheduler built for it."""

import copy
import functools
import math
import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import (
    STOCK_SCHEDULER,
    ConfigError,
    SarathiConfig,
    check_scheduler,
)
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.engine.offline import build_scheduler, config_folder, engine_config
from vllm_sarathi.simulation.calibrated import (
    CalibratedTimes,
    Ratios,
    StepModel,
    calibrated_model,
    normal_ratios,
)
from vllm_sarathi.simulation.devices import Device, Roofline, device
from vllm_sarathi.simulation.express import express_class
from vllm_sarathi.simulation.models import ModelShape, model_shape
from vllm_sarathi.simulation.simulator import StepTimes

MEMORY_SHARE = 0.9
"""vLLM's `gpu_memory_utilization` by default."""

RESERVED_BYTES = 3e9
"""Activations of the largest step, captured graphs and the device's own context, per device."""

BLOCK_TOKENS = 16

PAPER_MAX_TOKENS = 16384
"""The longest request of the paper's datasets; the paper serves all its models with it."""


@dataclass(frozen=True)
class Deployment:
    """A model on devices.

    Attributes:
        name: as the user wrote it.
        model: the model's shape.
        unit: each of the devices.
        tensor_parallel, stages: how the model is spread.
        devices_per_node: devices in one machine.
        max_tokens: the longest request, tokens.
        max_sequences: the most requests in a step.
        step_tokens: vLLM's default for the tokens of a step there.
    """

    name: str
    model: ModelShape
    unit: Device
    tensor_parallel: int
    stages: int
    devices_per_node: int
    max_tokens: int
    max_sequences: int
    step_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            ConfigError: the model does not fit, with the arithmetic.
        """
        devices = self.tensor_parallel * self.stages
        weights = self.model.parameters * self.model.dtype_bytes / devices
        share = max(1.0, self.model.kv_heads / self.tensor_parallel) / self.model.kv_heads
        token = self.model.kv_bytes_per_token * share / self.stages
        room = MEMORY_SHARE * self.unit.memory_bytes - weights - RESERVED_BYTES
        tokens = int(room / token)
        if tokens < self.max_tokens:
            raise ConfigError(
                f"--deployment {self.name}: does not fit: {MEMORY_SHARE:.0%} of {self.unit.memory_bytes / 1e9:.0f} GB "
                f"per device less {weights / 1e9:.1f} GB of weights ({self.model.parameters / 1e9:.1f}e9 parameters "
                f"over {devices}) less {RESERVED_BYTES / 1e9:.0f} GB reserved leaves {room / 1e9:.1f} GB of KV cache, "
                f"and one request of {self.max_tokens} tokens needs {self.max_tokens * token / 1e9:.1f} GB; "
                "spread it over more devices (MODEL/DEVICE:tp2pp2)."
            )
        return tokens

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take; `seed` is for what scatters."""
        return Roofline(self.model, self.unit, self.tensor_parallel, self.stages, self.devices_per_node)

    def read_s(self, tokens: float) -> float:
        """Return the seconds to read a prompt of so many tokens with nothing beside it."""
        count = max(1, round(tokens))
        return self.times().stage_s(StepShape(count, 0, 0, chunk_work(0, count), 1), 0)

    @property
    def in_flight(self) -> int:
        """Batches in flight, as vLLM does it by default: asynchronous on one stage, else one per stage."""
        return 2 if self.stages == 1 else self.stages


CPU_KV_CACHE_GIB = 4
CPU = Device(math.nan, math.nan, CPU_KV_CACHE_GIB * 2**30, math.nan, math.nan, default_sequences=128)
"""A CPU has no data sheet here: nothing but its memory for the KV cache, and vLLM's defaults, is stated."""

CPU_MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB for the KV cache, as `vllm serve` reads it."""


@dataclass(frozen=True)
class CalibratedDeployment(Deployment):
    """A model on a CPU that has been measured.

    Attributes:
        step_model: how long its steps take.
        step_ratios: how they scatter.
    """

    step_model: StepModel
    step_ratios: Ratios

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds.

        Raises:
            ConfigError: too few for one request, with the arithmetic.
        """
        room, token = self.unit.memory_bytes, self.model.kv_bytes_per_token
        if room < self.max_tokens * token:
            raise ConfigError(
                f"--deployment {self.name}: does not fit: {CPU_MEMORY_VARIABLE} is {room / 2**30:.0f} GiB, and one "
                f"request of {self.max_tokens} tokens needs {self.max_tokens * token / 2**30:.1f} GiB of KV cache."
            )
        return int(room / token)

    def times(self, seed: int = 0) -> StepTimes:
        """Return how long its steps take; `seed` is for what scatters."""
        return CalibratedTimes(self.step_model, self.step_ratios, seed)

    @property
    def in_flight(self) -> int:
        """One batch: vLLM schedules synchronously on a CPU."""
        return 1


PAPER_DEPLOYMENTS = {
    "mistral-7b/a100": "mistral-7b/a100:tp1",
    "yi-34b/2xa100": "yi-34b/a100:tp2",
    "llama2-70b/8xa40": "llama2-70b/a40:tp4pp2",
    "falcon-180b/8xa100": "falcon-180b/a100:tp4pp2@4",
    "falcon-180b/8xa100-tp8": "falcon-180b/a100:tp8@4",
}
"""The four of the paper (table 1), and the last one without a pipeline (section 5.3); `@4` is four devices to a
machine, with 100 Gbit Ethernet between machines."""

PATTERN = re.compile(
    r"(?:(?P<count>\d+)x)?(?P<device>[^:@]+)(?::tp(?P<tp>\d+)(?:pp(?P<pp>\d+))?)?(?:@(?P<node>\d+))?"
)


def deployment(name: str, calibration_dir: str | None = None) -> Deployment:
    """Return a deployment by name.

    Args:
        name: `MODEL/DEVICE`, with `:tp4` or `:tp4pp2` for several devices and `@4` for four of them to a machine;
            `MODEL/4xDEVICE` is short for `:tp4`. The model may be a folder with a config.json.
        calibration_dir: where the calibrations for `MODEL/cpu` are, as `--calibration-dir` of `vllm serve` takes it.

    Raises:
        ConfigError: an unknown model or device, or a model that does not fit.
    """
    from_paper = name.lower() in PAPER_DEPLOYMENTS
    model_name, _, rest = PAPER_DEPLOYMENTS.get(name.lower(), name).rpartition("/")
    if model_name and rest.lower() == "cpu":
        learnt = calibrated_model(model_name, calibration_dir)
        return cpu_deployment(model_name, learnt, normal_ratios(learnt.relative_error))
    match = PATTERN.fullmatch(rest)
    if not model_name or match is None:
        raise ConfigError(
            f"--deployment {name!r}: must be MODEL/DEVICE, as in {', '.join(PAPER_DEPLOYMENTS)}."
        )
    shape, unit = model_shape(model_name), device(match["device"])
    tensor_parallel = int(match["tp"] or match["count"] or 1)
    stages = int(match["pp"] or 1)
    devices_per_node = int(match["node"] or 8)
    if devices_per_node < 1:
        raise ConfigError(f"--deployment {name!r}: a machine has at least 1 device, not {devices_per_node}.")
    if tensor_parallel < 1 or shape.heads % tensor_parallel:
        raise ConfigError(
            f"--deployment {name!r}: {shape.heads} attention heads cannot be shared by {tensor_parallel} devices."
        )
    if not 1 <= stages <= shape.layers:
        raise ConfigError(f"--deployment {name!r}: {stages} stages for {shape.layers} layers.")
    made = Deployment(
        name=name,
        model=shape,
        unit=unit,
        tensor_parallel=tensor_parallel,
        stages=stages,
        devices_per_node=devices_per_node,
        max_tokens=max(shape.max_position, PAPER_MAX_TOKENS) if from_paper else shape.max_position,
        max_sequences=unit.default_sequences,
        step_tokens=unit.default_step_tokens,
    )
    _ = made.kv_tokens
    return made


def cpu_deployment(
    model_name: str, step_model: StepModel, step_ratios: Ratios, kv_cache_gib: int | None = None
) -> CalibratedDeployment:
    """Return a model on a CPU with the step times that were measured there, and vLLM's defaults for a CPU.

    Args:
        model_name: the model, as `deployment` takes it.
        step_model, step_ratios: the step times, and their scatter.
        kv_cache_gib: the size of the KV cache; None for what the environment says.

    Raises:
        ConfigError: an unknown model, or a size of the KV cache that is no number.
    """
    shape = model_shape(model_name)
    space = str(kv_cache_gib or os.environ.get(CPU_MEMORY_VARIABLE) or CPU_KV_CACHE_GIB)
    if not space.isdigit() or int(space) < 1:
        raise ConfigError(f"{CPU_MEMORY_VARIABLE}={space!r}: must be a whole number of GiB, at least 1.")
    made = CalibratedDeployment(
        name=f"{model_name}/cpu",
        model=shape,
        unit=replace(CPU, memory_bytes=int(space) * 2**30),
        tensor_parallel=1,
        stages=1,
        devices_per_node=1,
        max_tokens=shape.max_position,
        max_sequences=CPU.default_sequences,
        step_tokens=CPU.default_step_tokens,
        step_model=step_model,
        step_ratios=step_ratios,
    )
    _ = made.kv_tokens
    return made


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler as a list of them names it: `sarathi`, `default`, `pressure`, or `NAME@N` with a fixed budget.

    Attributes:
        text: as the user wrote it.
        config: our settings; None for vLLM's own scheduler.
        step_tokens: the engine's limit on the tokens of a step; None for the deployment's default.
    """

    text: str
    config: SarathiConfig | None
    step_tokens: int | None = None


def scheduler_choice(text: str, **settings: Any) -> SchedulerChoice:
    """Read a scheduler's name.

    Args:
        text: NAME or NAME@N.
        settings: those of SarathiConfig, for `sarathi`; a fixed budget leaves out `tbt_slo_ms`.

    Raises:
        ConfigError: an unknown name, or a budget that is no number.
    """
    name, at, budget_text = text.partition("@")
    check_scheduler(name)
    budget = None
    if at:
        if not budget_text.isdigit() or int(budget_text) < 1:
            raise ConfigError(
                f"--schedulers {text!r}: must be NAME@N with N tokens per step, as in sarathi@512."
            )
        budget = int(budget_text)
    if name == STOCK_SCHEDULER:
        return SchedulerChoice(text, None, budget)
    if budget is not None:
        settings = {k: v for k, v in settings.items() if k != "tbt_slo_ms"} | {"token_budget": budget}
    return SchedulerChoice(text, SarathiConfig(scheduler=name, **settings))


def build(
    place: Deployment, choice: SchedulerChoice, share_prefixes: bool = False, in_flight: int | None = None
) -> Any:
    """Return a scheduler for a deployment, as vLLM's engine core would build it.

    Args:
        place: the deployment.
        choice: the scheduler.
        share_prefixes: whether prefix caching is on.
        in_flight: batches in flight, where that is not the deployment's own.
    """
    # A whole prompt has to fit into one step for those that never cut it.
    step_tokens = choice.step_tokens or (place.step_tokens if choice.config is None else place.max_tokens)
    batches = in_flight or place.in_flight
    asynchronous = place.stages == 1 and batches == 2
    config = copy.copy(_base_config(place.max_tokens))
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.parallel_config = copy.copy(config.parallel_config)
    config.cache_config = copy.copy(config.cache_config)
    config.scheduler_config.max_num_batched_tokens = step_tokens
    config.scheduler_config.max_num_scheduled_tokens = step_tokens
    config.scheduler_config.max_num_seqs = place.max_sequences
    config.scheduler_config.async_scheduling = asynchronous
    config.parallel_config.pipeline_parallel_size = place.stages
    config.cache_config.enable_prefix_caching = share_prefixes
    ours = None
    if choice.config is not None:
        # Imported here: it needs vLLM, and what only names deployments does not.
        from vllm_sarathi.engine.scheduler import AsyncSarathiScheduler, SarathiScheduler

        ours = AsyncSarathiScheduler if asynchronous else SarathiScheduler
        config.additional_config = choice.config.engine_args()["additional_config"]
    blocks = place.kv_tokens // BLOCK_TOKENS
    return build_scheduler(config, blocks, express_class(ours, asynchronous))


@functools.cache
def _base_config(max_tokens: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return engine_config(
            config_folder(Path(folder), max_position_embeddings=max_tokens),
            max_model_len=max_tokens,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=False,
        )
