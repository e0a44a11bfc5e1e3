"""A schedule as the four fields that training services take, and what is lost by that.

Notation: T steps, W = round(warmup_ratio T) of them warm-up, r = min_lr_ratio, p = (t - W) / (T - W). With the peak as
`learning_rate`, step t has the rate peak t / W in the warm-up, as in transformers, and then peak (r + (1 - r) f(p)),
with f = 1 (constant), 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from autolrs_plugin.core.config import ConfigError

FAR = 0.05
"""Fields whose mean deviation is above this are no good stand-in for the schedule: a twentieth of the mean rate."""

KINDS = ("constant", "linear", "cosine")
WARMUP_RATIOS = tuple(i / 200 for i in range(41))
MIN_LR_RATIOS = tuple(i / 100 for i in range(100))

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fields:
    """The closest schedule that four fields can say.

    Attributes:
        learning_rate: the peak.
        lr_scheduler_type: `constant`, `linear` or `cosine`.
        warmup_ratio: the share of the steps that is warm-up.
        min_lr_ratio: the last rate, divided by the peak.
        mean_deviation: mean over the steps of |rate by the fields - rate|, divided by the mean rate.
        max_deviation: the greatest |rate by the fields - rate|, divided by the greatest rate.
        max_deviation_step: the step that has it, from 0.
    """

    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    min_lr_ratio: float
    mean_deviation: float
    max_deviation: float
    max_deviation_step: int

    def settings(self) -> dict[str, float | str]:
        """Return the four fields alone."""
        names = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "min_lr_ratio")
        values = asdict(self)
        return {name: values[name] for name in names}

    def deviation(self) -> str:
        """Return how far the fields are from the schedule, and what to do where that is far."""
        advice = "; use the exported list of rates where you can" if self.mean_deviation > FAR else ""
        return (
            f"the four fields differ from the schedule by {self.mean_deviation:.1%} of the mean rate on average, and "
            f"by up to {self.max_deviation:.1%} of the greatest (at step {self.max_deviation_step}){advice}"
        )


def field_curve(kind: str, steps: int, warmup_ratio: float, min_lr_ratio: float) -> Rates:
    """Return the share of the peak that the fields give each step, shape [T]."""
    warmup = round(warmup_ratio * steps)
    step = np.arange(steps, dtype=np.float64)
    part = np.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
    falls = {"constant": np.ones(steps), "linear": 1 - part, "cosine": (1 + np.cos(np.pi * part)) / 2}[kind]
    curve = min_lr_ratio + (1 - min_lr_ratio) * falls
    return np.where(step < warmup, step / max(1, warmup), curve)


def to_fields(lrs: Sequence[float]) -> Fields:
    """Return the fields whose rates are the closest (least squares) to those of a schedule.

    Args:
        lrs: one learning rate per step, shape [T].

    Raises:
        ConfigError: there are no steps, or all rates are 0.
    """
    rates = np.asarray(lrs, dtype=np.float64)
    if not rates.size or not rates.max() > 0:
        raise ConfigError(f"lrs: {rates.size} rates, none above 0; there is no schedule to export.")
    best: tuple[float, str, float, float, float] | None = None
    for kind in KINDS:
        for warmup in WARMUP_RATIOS:
            for least in MIN_LR_RATIOS if kind != "constant" else (1.0,):
                curve = field_curve(kind, rates.size, warmup, least)
                norm = float(curve @ curve)
                peak = float(curve @ rates) / norm if norm else 0.0
                error = float(np.square(peak * curve - rates).sum())
                if best is None or error < best[0]:
                    best = (error, kind, warmup, least, peak)
    assert best is not None
    _, kind, warmup, least, peak = best
    off = np.abs(peak * field_curve(kind, rates.size, warmup, least) - rates)
    return Fields(
        learning_rate=peak,
        lr_scheduler_type=kind,
        warmup_ratio=warmup,
        min_lr_ratio=least,
        mean_deviation=float(off.mean() / rates.mean()),
        max_deviation=float(off.max() / rates.max()),
        max_deviation_step=int(off.argmax()),
    )
