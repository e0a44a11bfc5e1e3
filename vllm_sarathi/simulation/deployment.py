"""Deployments and schedulers by name, and a scheduler built for a deployment."""

import copy
import functools
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import (
    BASELINES,
    SCHEDULERS,
    STOCK_SCHEDULER,
    ConfigError,
    SarathiConfig,
    by_slo_alone,
    check_scheduler,
)
from vllm_sarathi.core.spec import SchedulerSpec
from vllm_sarathi.engine.offline import build_scheduler, config_folder, engine_config
from vllm_sarathi.simulation.calibrated import Ratios, StepModel, calibrated_model, normal_ratios
from vllm_sarathi.simulation.config_reader import listed
from vllm_sarathi.simulation.devices.measured import kernels
from vllm_sarathi.simulation.devices.package import (
    MACHINE_DEVICES,
    PACKAGE,
    NotMeasured,
    Spread,
    known_models,
    model_config,
)
from vllm_sarathi.simulation.devices.roofline import device
from vllm_sarathi.simulation.express import express_class
from vllm_sarathi.simulation.model_limits import Limits, check_spread, described_shape, limits_of
from vllm_sarathi.simulation.models import model_shape, shape_of_config
from vllm_sarathi.simulation.placement import (
    CPU,
    CPU_KV_CACHE_GIB,
    CPU_MEMORY_VARIABLE,
    CalibratedDeployment,
    Deployment,
    MeasuredDeployment,
    RooflineDeployment,
)
from vllm_sarathi.simulation.quantization import NAMED_BYTES
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

BLOCK_TOKENS = 16

PAPER_MAX_TOKENS = 16384
"""The longest request of the paper's datasets; the paper serves all its models with it."""

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
    r"(?:(?P<count>\d+)x)?(?P<device>[^:@]+)"
    r"(?::(?=.)(?P<precision>fp8|nvfp4)?(?:tp(?P<tp>\d{1,4}))?(?:pp(?P<pp>\d{1,4}))?(?P<ep>ep)?"
    r"(?:skew(?P<skew>\d(?:\.\d{1,3})?))?(?P<kv>kvfp8)?)?"
    r"(?:@(?P<node>\d{1,4}))?"
)


def deployment(name: str, calibration_dir: str | None = None, longest: int | None = None) -> Deployment:
    """Return a deployment by name.

    The name is `MODEL/DEVICE`. A model by its name on a hub, `OWNER/MODEL`, has its step times from measured kernels
    where aiconfigurator-core is installed and knows model and device; else, and for the short names of
    `models.MODELS` and a folder with a config.json, they are a roofline's.

    Args:
        name: `MODEL/DEVICE`, with what the devices are to do after a colon: `:tp4` or `:tp4pp2` for several, `:fp8`
            (or `:fp8tp4`) for weights in FP8 instead of the checkpoint's own precision, `ep` after them for experts
            that are distributed whole, `skew1.2` for experts whose loads follow a power law of that exponent, `kvfp8`
            at the end for a KV cache in FP8; and `@4` for four devices to a machine. `MODEL/4xDEVICE` is short for
            `:tp4`.
        calibration_dir: where the calibrations for `MODEL/cpu` are, as `--calibration-dir` of `vllm serve` takes it.
        longest: the longest request that is served (`--max-model-len`); None for the model's own.

    Raises:
        ConfigError: an unknown model or device, or a model that does not fit.
    """
    model_name, _, rest = PAPER_DEPLOYMENTS.get(name.lower(), name).rpartition("/")
    if model_name and rest.lower() == "cpu":
        learnt = calibrated_model(model_name, calibration_dir)
        return cpu_deployment(model_name, learnt, normal_ratios(learnt.relative_error))
    match = PATTERN.fullmatch(rest)
    if not model_name or match is None:
        raise ConfigError(
            f"--deployment {name!r}: must be MODEL/DEVICE, as in {', '.join(PAPER_DEPLOYMENTS)}."
        )
    devices_per_node = int(match["node"] or 8)
    if devices_per_node < 1:
        raise ConfigError(f"--deployment {name!r}: a machine has at least 1 device, not {devices_per_node}.")
    tensor_parallel, stages = int(match["tp"] or match["count"] or 1), int(match["pp"] or 1)
    if tensor_parallel < 1 or stages < 1:
        raise ConfigError(f"--deployment {name!r}: tp and pp are at least 1.")
    if match["count"] and match["tp"] and int(match["count"]) != tensor_parallel * stages:
        raise ConfigError(
            f"--deployment {name!r}: {match['count']} devices and tp{tensor_parallel} contradict each other."
        )
    skew = None if match["skew"] is None else float(match["skew"])
    spread = Spread(tensor_parallel, stages, bool(match["ep"]), match["precision"], bool(match["kv"]), skew)
    made = _deployment(name, model_name, match["device"].lower(), spread, devices_per_node)
    if longest is not None:
        made = replace(made, max_tokens=longest)
    _ = made.kv_tokens
    return made


def _deployment(
    name: str, model_name: str, device_name: str, spread: Spread, devices_per_node: int
) -> Deployment:
    """Return a deployment from measured kernels where there are any, else from a data sheet."""
    unit, hub_name = device(device_name), known_models().get(model_name.lower())
    common: dict[str, Any] = {
        "name": name,
        "unit": unit,
        "tensor_parallel": spread.tensor_parallel,
        "stages": spread.stages,
        "max_sequences": unit.default_sequences,
        "step_tokens": unit.default_step_tokens,
    }
    notes: tuple[str, ...] = ()
    if hub_name is None:
        shape = described_shape(model_name)
    else:
        check_spread(name, model_name, spread, limits_of(hub_name))
        try:
            _check_machines(spread, devices_per_node)
            measured = kernels(hub_name, device_name, spread)
        except NotMeasured as reason:
            notes = (
                f"{reason}: matrix products, attention, experts and communication are all a roofline's.",
            )
            shape = shape_of_config(model_config(hub_name), f"--deployment {name}: {reason}; its config.json")
        else:
            return MeasuredDeployment(**common, max_tokens=measured.max_tokens, kernels=measured)
    check_spread(name, model_name, spread, Limits.of(shape))
    if spread.precision is not None:
        shape = shape.weights_in(NAMED_BYTES[spread.precision])
    if spread.fp8_kv:
        shape = shape.kv_in(1.0)
    if shape.unread:
        notes += (f"its config.json has keys that were not used and may matter: {listed(shape.unread)}.",)
    longest = shape.max_position
    if name.lower() in PAPER_DEPLOYMENTS:
        longest = max(longest, PAPER_MAX_TOKENS)
    return RooflineDeployment(
        **common,
        max_tokens=longest,
        model=replace(shape, skew=spread.skew or 0.0),
        devices_per_node=devices_per_node,
        expert_parallel=spread.expert_parallel,
        notes=notes,
    )


def _check_machines(spread: Spread, devices_per_node: int) -> None:
    """Raise NotMeasured where a replica's layers, or with fewer devices to a machine its stages, are of several."""
    if spread.tensor_parallel > MACHINE_DEVICES:
        raise NotMeasured(f"{PACKAGE} has no tables of a layer that devices of several machines share")
    if devices_per_node < min(spread.devices, MACHINE_DEVICES):
        raise NotMeasured(f"{PACKAGE} has no tables of machines with {devices_per_node} devices")


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


def check_some(schedulers: Sequence[str]) -> None:
    """Raise ConfigError if `--schedulers` names none."""
    if not schedulers:
        valid = ", ".join((*SCHEDULERS, STOCK_SCHEDULER))
        raise ConfigError(f"--schedulers: names none; valid: {valid}, or one of them with a budget, NAME@N.")


def scheduler_choice(text: str, **settings: Any) -> SchedulerChoice:
    """Read a scheduler's name.

    Args:
        text: NAME or NAME@N.
        settings: those of SarathiConfig, for `sarathi`; a fixed budget and the baselines leave out what they ignore.

    Raises:
        ConfigError: an unknown name, or a budget that is no number.
    """
    name, budget = SchedulerSpec.parse(text)
    check_scheduler(name)
    if name == STOCK_SCHEDULER:
        return SchedulerChoice(text, None, budget)
    if budget is not None or name in BASELINES:
        ignored = by_slo_alone(settings)
        settings = {k: v for k, v in settings.items() if k not in ignored}
    if budget is not None:
        settings["token_budget"] = budget
    return SchedulerChoice(text, SarathiConfig(scheduler=name, **settings))


def build(
    place: Deployment,
    choice: SchedulerChoice,
    share_prefixes: bool = False,
    in_flight: int | None = None,
    enough_tokens: int | None = None,
) -> Any:
    """Return a scheduler for a deployment, as vLLM's engine core would build it.

    Args:
        place: the deployment.
        choice: the scheduler.
        share_prefixes: whether prefix caching is on.
        in_flight: batches in flight, where that is not the deployment's own.
        enough_tokens: what the load can need of the KV cache at most: a larger cache takes longer to set up.
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
    kv_tokens = place.kv_tokens if enough_tokens is None else min(place.kv_tokens, enough_tokens)
    return build_scheduler(config, kv_tokens // BLOCK_TOKENS, express_class(ours, asynchronous))


def enough_for(place: Deployment, requests: Sequence[SimulatedRequest]) -> int | None:
    """Return the tokens of KV cache beyond which nothing differs; None where prefixes are shared, which stay in it.

    Args:
        place: the deployment.
        requests: all that are sent.
    """
    if any(request.prefix for request in requests):
        return None
    # Room for all of them at once, each with a block that it does not fill, and for a step.
    each = (request.prompt_tokens + request.output_tokens + 2 * BLOCK_TOKENS for request in requests)
    return sum(each) + place.step_tokens


@functools.cache
def _base_config(max_tokens: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return engine_config(
            config_folder(Path(folder), max_position_embeddings=max_tokens),
            max_model_len=max_tokens,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=False,
        )
