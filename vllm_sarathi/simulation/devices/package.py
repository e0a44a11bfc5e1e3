"""The package aiconfigurator-core: which models and devices it knows, and how a model is described to it."""

import functools
import json
import logging
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sarathi.simulation.quantization import QUANTIZED_BESIDE, stated_beside

PACKAGE = "aiconfigurator-core"
BACKEND = "vllm"

SYSTEMS = {
    "a100": "a100_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "l4": "l4",
}
"""Our names of devices, and the package's."""

PRECISIONS = ("fp8", "nvfp4")
"""Precisions of the weights that a deployment's name may ask for; without one, the checkpoint's own."""

BLOCK_FP8 = "fp8_block"

LOADS = {0.0: "balanced", 1.01: "power_law_1.01", 1.2: "power_law_1.2"}
"""The package's names of how uneven the experts' loads are in its tables, by the exponent of the power law. Without
one it takes 1.2, and 1.01 for the models of DeepSeek."""

MACHINE_DEVICES = 8
"""Devices of a machine, between which communication was measured."""

SPARSE_KEY = "index_topk"
"""In the config.json of a model with sparse attention, whose KV cache has a layout of its own."""


class NotMeasured(Exception):
    """There are no measured times of this model on this device; the message says why."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How a model is spread over devices.

    Attributes:
        tensor_parallel: devices that share each layer.
        stages: pipeline stages.
        expert_parallel: whether experts are distributed whole; else each is cut like every other layer.
        precision: of the weights, one of PRECISIONS; None for the checkpoint's own.
        fp8_kv: whether the KV cache is in FP8 (`--kv-cache-dtype fp8`); else it is what the checkpoint states.
        skew: exponent of the power law that the experts' loads follow, 0 for even loads; None for that of the package
            where there are measured times, else 0.
    """

    tensor_parallel: int = 1
    stages: int = 1
    expert_parallel: bool = False
    precision: str | None = None
    fp8_kv: bool = False
    skew: float | None = None

    @property
    def devices(self) -> int:
        """Devices of a replica."""
        return self.tensor_parallel * self.stages

    def arguments(self, experts: bool) -> dict[str, Any]:
        """Return what the package calls it; `experts` says whether the model has any."""
        made: dict[str, Any] = {"tp_size": self.tensor_parallel, "pp_size": self.stages}
        if experts:
            made["moe_ep_size" if self.expert_parallel else "moe_tp_size"] = self.tensor_parallel
        if self.precision is not None:
            made["gemm_quant_mode"] = self.precision
            if experts:
                made["moe_quant_mode"] = self.precision
        if self.fp8_kv:
            made["kvcache_quant_mode"] = "fp8"
        return made


@functools.cache
def known_models() -> dict[str, str]:
    """Return the models that the package has a config.json of, by how they may be named in lower case.

    A name may leave out the owner's `Meta-` and an `-Instruct` that changes nothing of the shape. Empty where the
    package is not installed.
    """
    try:
        from aiconfigurator_core.sdk.common import DefaultHFModels
    except ModuleNotFoundError:
        return {}
    names: dict[str, str] = {}
    for name in sorted(DefaultHFModels):
        plain = name.lower().replace("/meta-", "/")
        for alias in (name.lower(), plain, plain + "-instruct"):
            names.setdefault(alias, name)
    return names


def model_config(name: str) -> dict[str, Any]:
    """Return the config.json that the package has of one of `known_models`, with what stands beside it."""
    import aiconfigurator_core

    folder = Path(aiconfigurator_core.__file__).parent / "model_configs"
    stem = name.replace("/", "--")
    config: dict[str, Any] = json.loads((folder / f"{stem}_config.json").read_text("utf-8"))
    beside = folder / f"{stem}_{QUANTIZED_BESIDE}"
    if beside.is_file() and not config.get("quantization_config"):
        config["quantization_config"] = stated_beside(json.loads(beside.read_text("utf-8")), str(beside))
    return config


def read_config(name: str) -> dict[str, Any]:
    """Return what the package reads out of a model's config.json."""
    from aiconfigurator_core.sdk.utils import get_model_config_from_model_path

    read: dict[str, Any] = get_model_config_from_model_path(name)
    return read


def system_of(unit: str) -> str:
    """Return the package's name of a device.

    Raises:
        NotMeasured: it has none of it.
    """
    if unit not in SYSTEMS:
        raise NotMeasured(f"{PACKAGE} has no tables of vLLM on {unit}")
    return SYSTEMS[unit]


@functools.cache
def tables_of(system: str) -> str:
    """Return the version of vLLM whose kernels were measured on a system.

    Raises:
        NotMeasured: there is none, or the package is not installed.
    """
    try:
        from aiconfigurator_core.sdk import perf_database
    except ModuleNotFoundError as error:
        raise NotMeasured(f"{PACKAGE} is not installed: pip install 'vllm-sarathi[devices]'") from error
    if not (perf_database.get_version_slots(system, BACKEND) or {}).get("current"):
        raise NotMeasured(f"{PACKAGE} has no tables of vLLM on {system}")
    return str(perf_database.resolve_query_version(system, BACKEND, "current"))


def compile_engine(
    model: str, system: str, arguments: dict[str, Any], skew: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the package's engine for a model on a system, and the arguments that it was compiled with.

    The tables of block-scaled FP8 products hold the launch of the kernel, which a captured graph has not: 0.18 ms on
    a B200 for every product of up to 1,280 tokens. So those products are asked for as FP8 with one scale, whose
    kernels do the same work; where that is not to be had, as they are.

    Args:
        model, system, arguments: as the package names them.
        skew: as in `Spread`.

    Raises:
        NotMeasured: the package lacks tables for it.
    """
    if skew not in (None, *LOADS):
        raise NotMeasured(f"{PACKAGE} has experts' loads of skew {', '.join(map(str, LOADS))}, not {skew:g}")
    from aiconfigurator_core.sdk.engine import EngineHandle

    said = read_config(model)["raw_config"]
    if not (said.get("kv_cache_quant_algo") or SPARSE_KEY in said):
        # The package takes FP8 weights for FP8 everywhere; vLLM's `auto` is the model's own type.
        arguments = {"kvcache_quant_mode": "bfloat16", **arguments}
    tries = [arguments]
    if said.get("quant_algo") == BLOCK_FP8 and "gemm_quant_mode" not in arguments:
        # The experts of a narrow share are not cut along the blocks, and then they are scaled otherwise, too.
        plain = {**arguments, "gemm_quant_mode": "fp8"}
        tries = [plain, {**plain, "moe_quant_mode": "fp8"}, arguments]
    reason = ""
    for tried in tries:
        try:
            with quiet(), expert_loads(skew):
                # The wrapper's methods only convert types: without it a query is a third quicker.
                engine = EngineHandle.compile(model, system, BACKEND, **tried)._engine
                engine.mixed_step_latency(64, 8, 64, 2)
        except (ValueError, RuntimeError, KeyError, AssertionError, NotImplementedError) as error:
            reason = reason or _first_line(error)
        else:
            return engine, tried
    raise NotMeasured(f"{PACKAGE} has no {model} on {system}: {reason}")


def _first_line(error: Exception) -> str:
    """Return what an error of the package says, without where its files are."""
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r"(\w[\w ]*: )\1+", r"\1", re.sub(r"\(first: [^)]*\)?", "", text))
    return textwrap.shorten(text, 160, placeholder=" ...")


@contextmanager
def expert_loads(skew: float | None) -> Iterator[None]:
    """Let the package compile with the tables of a skew: its config has a field for it, its compiler no argument."""
    from aiconfigurator_core.sdk import engine as imported

    engine: Any = imported
    own = engine.build_model_config

    def with_skew(**named: Any) -> Any:
        config = own(**named)
        if skew is not None:
            config.workload_distribution = LOADS[skew]
        return config

    engine.build_model_config = with_skew
    try:
        yield
    finally:
        engine.build_model_config = own


@contextmanager
def quiet() -> Iterator[None]:
    """Let the package log nothing: it warns of every table of a system, `Kernels.source` of those that are used."""
    logger = logging.getLogger("aiconfigurator_core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
