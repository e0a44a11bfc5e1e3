"""The engine's memory of its device: loaded before the first step, kept while it works and when it ends."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import BASELINES, SarathiConfig
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.steptime.store import (
    CalibrationError,
    Key,
    calibration_folder,
    load_calibration,
    save_calibration,
)
from vllm_sarathi.engine.vllm.internals import current_platform, installed_version, logger
from vllm_sarathi.engine.vllm.protocols import VllmConfig

LEAST_STEPS = 32
"""What so few steps taught is not worth keeping."""


class CalibrationMemory:
    """One deployment's calibration; whatever is wrong with the cache is said once, and harms nothing.

    Args:
        folder: where calibrations are kept.
        key: which deployment this is.
    """

    def __init__(self, folder: Path, key: Key) -> None:
        self.folder = folder
        self.key = key
        self._complained = False

    def load(self, model: StepTimeModel) -> None:
        """Give the model what an earlier run learnt, as a prior; without it, the start is a cold one."""
        try:
            path = load_calibration(model, self.folder, self.key)
        except CalibrationError as error:
            self._complain(f"Starting without calibration: {error}")
            return
        if path is None:
            logger.info("No calibration in %s fits: the step-time model starts cold.", self.folder)
        else:
            logger.info("Calibration read from %s.", path)

    def snapshot(self, model: StepTimeModel) -> dict[str, Any] | None:
        """Return what a model has learnt, for `save`; None while that is too little."""
        return model.to_mapping() if model.steps >= LEAST_STEPS else None

    def save(self, learnt: Mapping[str, Any]) -> None:
        """Keep what `snapshot` returned."""
        try:
            save_calibration(learnt, self.folder, self.key)
        except OSError as error:
            self._complain(
                f"What is learnt is not kept: {self.folder} cannot be written to ({error.strerror})."
            )

    def _complain(self, message: str) -> None:
        if not self._complained:
            logger.warning("%s", message)
        self._complained = True


def open_memory(
    vllm_config: VllmConfig, config: SarathiConfig, model: StepTimeModel
) -> CalibrationMemory | None:
    """Return an engine's memory, already loaded into the model; None where there is none, or nothing learns."""
    if config.token_budget is not None or config.scheduler in BASELINES:  # nothing learns
        return None
    try:
        folder = calibration_folder(config.calibration_dir)
    except CalibrationError as error:
        logger.warning("Starting without calibration: %s", error)
        return None
    if folder is None:
        return None
    memory = CalibrationMemory(folder, calibration_key(vllm_config))
    memory.load(model)
    return memory


def calibration_key(vllm_config: VllmConfig) -> dict[str, str | int | bool | None]:
    """Return what decides how long a step takes: a calibration is used where all of it is the same."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    return {
        "model": os.path.abspath(model.model) if os.path.exists(model.model) else model.model,
        "revision": model.revision,
        "dtype": str(model.dtype),
        "quantization": None if model.quantization is None else str(model.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "eager": bool(model.enforce_eager),
        "speculation": None if speculative is None else str(speculative.method),
        "speculative_tokens": vllm_config.num_speculative_tokens,
        "lora": vllm_config.lora_config is not None,
        "async_scheduling": bool(vllm_config.scheduler_config.async_scheduling),
        "device": _device_name(),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "vllm": installed_version(),
    }


def _device_name() -> str:
    platform = current_platform()
    if not platform.is_cpu():
        return str(platform.get_device_name())
    # To vLLM every CPU is "cpu". How many threads there are differs between its processes: cores it is.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
