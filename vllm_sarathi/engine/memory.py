"""The engine's memory of its device: loaded before the first step, kept while it works and when it ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sarathi.core.calibration import (
    CalibrationError,
    Key,
    calibration_folder,
    load_calibration,
    save_calibration,
)
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.cost_model import CostModel
from vllm_sarathi.engine.vllm_api import calibration_key, logger

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

    def load(self, model: CostModel) -> None:
        """Give the model what an earlier run learnt, as a prior; without it, the start is a cold one."""
        try:
            path = load_calibration(model, self.folder, self.key)
        except CalibrationError as error:
            self._complain(f"Starting without calibration: {error}")
            return
        if path is None:
            logger.info("No calibration in %s fits: the step model learns from scratch.", self.folder)
        else:
            logger.info("Calibration read from %s.", path)

    def snapshot(self, model: CostModel) -> dict[str, Any] | None:
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


def open_memory(vllm_config: Any, config: SarathiConfig, model: CostModel) -> CalibrationMemory | None:
    """Return an engine's memory, already loaded into the model; None where there is none, or nothing learns."""
    if config.token_budget is not None:
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
