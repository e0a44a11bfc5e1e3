"""A device without a data sheet: a CPU whose step times have been measured.

Two measurements serve: what `vllm-sarathi profile` has left in the calibration folder, and the step trace of a server
under load. Both give a mean time for each shape of a step, and how real steps scatter around it.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.core.steptime.features import SCALES, Curve, features, numbers
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.steptime.nonnegative import nonnegative_least_squares
from vllm_sarathi.core.steptime.store import CalibrationError, calibration_folder, load_latest
from vllm_sarathi.core.types import StepShape

FIT_ROUNDS = 6
HUBER_SHARE = 0.15
"""Residuals above this share count by their size, not its square: a hiccup says nothing of the device."""

LEAST_STEPS = 64

Ratios = Mapping[bool, tuple[float, ...]]
"""Measured over predicted times: of steps in which prompts were read (True), and of decodes alone (False)."""


class StepModel(Protocol):
    """Predicts step times."""

    def predict(self, shape: StepShape) -> float:
        """Return the expected seconds of a step."""
        ...


@dataclass(frozen=True)
class StepFit:
    """A step-time model that has learnt all that it will.

    Attributes:
        coefficients: seconds per unit of each feature, in the order of `steptime.features`.
    """

    coefficients: tuple[float, ...]

    @cached_property
    def _curve(self) -> Curve:
        return Curve(self.coefficients)

    def predict(self, shape: StepShape) -> float:
        """Return the expected seconds of a step."""
        return self._curve.predict(shape)


class CalibratedTimes:
    """Step times of a device as they were measured, with the scatter that was measured.

    A measured step holds everything that the engine did in it, the host's part included.

    Args:
        model: the mean times.
        ratios: each simulated step is as far off as one of them, drawn at random.
        seed: of the draw.
    """

    stages = 1
    host_s = 0.0
    host_sequence_s = 0.0

    def __init__(self, model: StepModel, ratios: Ratios, seed: int = 0) -> None:
        self._model = model
        self._ratios = ratios
        self._draw = random.Random(seed).choice

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that a step takes; see `simulator.StepTimes`."""
        return self._model.predict(shape) * self._draw(self._ratios[shape.prefill_work > 0])

    def send_s(self, tokens: int) -> float:
        """Return 0: there is one stage."""
        return 0.0


def normal_ratios(spread: float, count: int = 256) -> Ratios:
    """Return ratios of mean 1 whose logarithm is normal with a standard deviation of `spread`."""
    normal = NormalDist(-0.5 * spread * spread, spread)
    ratios = tuple(math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count))
    return {True: ratios, False: ratios}


def fit_steps(steps: Sequence[TracedStep]) -> tuple[StepFit, Ratios]:
    """Return the step times and the scatter in a step trace.

    The fit is weighted least squares of the relative error, under coefficients of at least zero. Steps are grouped by
    the octave of their tokens, and each group weighs as much as its square root: else a thousand decodes would drown
    the few prompts.

    Raises:
        RuntimeError: too few steps, or none in which prompts were read, or none without.
    """
    groups = {work: [s for s in steps if (s.shape.prefill_work > 0) == work] for work in (True, False)}
    if len(steps) < LEAST_STEPS or not all(groups.values()):
        raise RuntimeError(f"{len(steps)} steps are too few to learn a device's step times from.")
    x = features([numbers(step.shape) for step in steps]) * SCALES
    measured = np.array([step.measured_s for step in steps])
    octaves = np.array([step.shape.tokens.bit_length() for step in steps])
    weights = 1 / np.sqrt(np.bincount(octaves)[octaves])
    predicted, robust = measured, np.ones(len(steps))
    u = np.zeros(len(SCALES))
    for _ in range(FIT_ROUNDS):
        weighted = (weights * robust / predicted**2)[:, None] * x
        a = x.T @ weighted
        a += 1e-9 * np.trace(a) * np.eye(len(u))
        u = nonnegative_least_squares(a, weighted.T @ measured, u > 0)
        predicted = x @ u
        residuals = np.abs(measured / predicted - 1)
        robust = np.minimum(1.0, HUBER_SHARE / np.maximum(residuals, 1e-9))
    fit = StepFit(tuple(float(c) for c in u * SCALES))
    ratios = {
        work: tuple(step.measured_s / fit.predict(step.shape) for step in group)
        for work, group in groups.items()
    }
    return fit, ratios


def calibrated_model(name: str, calibration_dir: str | None) -> StepTimeModel:
    """Return the step times that `vllm-sarathi profile` has last measured for a model.

    Args:
        name: the model, as `--model` named it: a folder, or a name on a model hub.
        calibration_dir: as `--calibration-dir` of `vllm serve` takes it; None for the default.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    model = StepTimeModel()
    try:
        folder = calibration_folder(calibration_dir)
        found = None if folder is None else load_latest(model, folder, name)
    except CalibrationError as error:
        raise ConfigError(f"--deployment {name}/cpu: {error}") from error
    if found is None:
        raise ConfigError(
            f"--deployment {name}/cpu: no calibration of it in {folder}; "
            f"`vllm-sarathi profile --model {name}` measures one (with the options that you serve with)."
        )
    return model
