"""Deployments and schedulers by name, and a scheduler built for a deployment."""

import contextlib
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
from vllm_sarathi.simulation.config_reader import INNER, listed
from vllm_sarathi.simulation.devices.measured import kernels
from vllm_sarathi.simulation.devices.package import (
    BLOCK_FP8,
    MACHINE_DEVICES,
    PACKAGE,
    NotMeasured,
    Spread,
    known_models,
    model_config,
    read_config,
)
from vllm_sarathi.simulation.devices.roofline import device
from vllm_sarathi.simulation.express import express_class
from vllm_sarathi.simulation.models import ModelShape, UnknownModel, model_shape, shape_of_config
from vllm_sarathi.simulation.placement import (
    CPU,
    CPU_KV_CACHE_GIB,
    CPU_MEMORY_VARIABLE,
    CalibratedDeployment,
    Deployment,
    DoesNotFit,
    MeasuredDeployment,
    RooflineDeployment,
)
from vllm_sarathi.simulation.quantization import METHODS, NAMED_BYTES
from vllm_sarathi.simulation.weight_blocks import Blocks
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
        shape = _described_shape(model_name)
    else:
        _check_spread(name, model_name, spread, _known_limits(hub_name))
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
    _check_spread(name, model_name, spread, Limits.of(shape))
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


@dataclass(frozen=True)
class Limits:
    """What bounds how a model can be spread over devices.

    Attributes:
        heads, kv_heads: of its attention; for a latent, which every device has, one of keys.
        layers: of the model.
        experts: whether it has any.
        weight_bytes: of a quantized weight; None for a checkpoint that is not quantized.
        blocks: what devices share of it, where its weights are in block-scaled FP8.
    """

    heads: int
    kv_heads: int
    layers: int
    experts: bool
    weight_bytes: float | None
    blocks: Blocks | None

    @classmethod
    def of(cls, shape: ModelShape) -> "Limits":
        """Return those of a shape."""
        least = min(shape.precision.mlp, shape.precision.experts, shape.precision.attention)
        quantized = least if least < shape.dtype_bytes else None
        experts = shape.experts is not None
        return cls(shape.heads, shape.kv_heads, shape.layers, experts, quantized, shape.blocks)


def limits_of(model_name: str) -> Limits:
    """Return those of a model by name.

    Raises:
        ConfigError: an unknown model; or a config.json that is not understood.
    """
    hub_name = known_models().get(model_name.lower())
    return Limits.of(_described_shape(model_name)) if hub_name is None else _known_limits(hub_name)


def max_tokens_of(model_name: str) -> int:
    """Return the longest request that a model takes by itself, prompt and answer, tokens.

    Raises:
        ConfigError: as for `limits_of`.
    """
    hub_name = known_models().get(model_name.lower())
    return (
        _described_shape(model_name).max_position
        if hub_name is None
        else int(read_config(hub_name)["context"])
    )


def _known_limits(hub_name: str) -> Limits:
    """Return those of a model that aiconfigurator-core knows."""
    config = read_config(hub_name)
    said = config["raw_config"]
    decoder = next((said[key] for key in INNER if said.get(key)), said)
    kv_heads = 1 if decoder.get("kv_lora_rank") else int(config["n_kv"])
    width = METHODS.get(str(said["quant_algo"]).removesuffix("_block")) if said.get("quant_algo") else None
    blocks = None
    if said.get("quant_algo") == BLOCK_FP8:
        with contextlib.suppress(ConfigError):  # what is not understood here may be measured all the same
            blocks = shape_of_config(model_config(hub_name), hub_name).blocks
    heads, layers, experts = int(config["n"]), int(config["layers"]), bool(config["num_experts"])
    return Limits(heads, kv_heads, layers, experts, width, blocks)


def _check_spread(name: str, model_name: str, spread: Spread, limits: Limits) -> None:
    """Refuse what vLLM refuses, and what would change nothing.

    Raises:
        ConfigError: so it is.
    """
    ways, origin = spread.tensor_parallel, f"--deployment {name!r}"
    if not limits.experts and (spread.expert_parallel or spread.skew is not None):
        said = "'ep' distributes" if spread.expert_parallel else "'skew' is of the loads of"
        raise ConfigError(f"{origin}: {said} experts, and {model_name} has none.")
    if limits.heads % ways:
        raise DoesNotFit(f"{origin}: {limits.heads} attention heads cannot be shared by {ways} devices.")
    if max(limits.kv_heads, ways) % min(limits.kv_heads, ways):
        raise DoesNotFit(
            f"{origin}: {limits.kv_heads} heads of keys cannot be shared by {ways} devices, nor copied evenly."
        )
    if spread.stages > limits.layers:
        raise DoesNotFit(f"{origin}: {spread.stages} stages for {limits.layers} layers.")
    cut = limits.blocks.cut(ways, spread.expert_parallel) if limits.blocks else None
    if cut is not None:
        raise DoesNotFit(f"{origin}: the checkpoint's FP8 weights are in blocks, and {cut}; vLLM refuses it.")
    asked = None if spread.precision is None else NAMED_BYTES[spread.precision]
    if asked is not None and limits.weight_bytes is not None and asked != limits.weight_bytes:
        raise ConfigError(
            f"{origin}: the checkpoint is quantized already, and vLLM does not quantize it again to "
            f"{spread.precision}; leave {spread.precision!r} out."
        )


def _check_machines(spread: Spread, devices_per_node: int) -> None:
    """Raise NotMeasured where a replica's layers, or with fewer devices to a machine its stages, are of several."""
    if spread.tensor_parallel > MACHINE_DEVICES:
        raise NotMeasured(f"{PACKAGE} has no tables of a layer that devices of several machines share")
    if devices_per_node < min(spread.devices, MACHINE_DEVICES):
        raise NotMeasured(f"{PACKAGE} has no tables of machines with {devices_per_node} devices")


def _described_shape(model_name: str) -> ModelShape:
    """Return the shape of a model that no package knows; the error says what would know more."""
    names = sorted(set(known_models().values()))
    try:
        return model_shape(model_name, names)
    except UnknownModel as error:
        if names or "/" not in model_name:
            raise
        raise ConfigError(
            f"{error} Models by their names on a hub need pip install 'vllm-sarathi[devices]'."
        ) from error


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
