"""Schedule: the learning rate of every step, as data: to export, to replay in another run, to look at beforehand.

Notation: T is the number of steps, W the number of warm-up steps, a peak the greatest learning rate.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.files import written_whole

VERSION = 1

DECAY = 0.2
"""Share of a run over which its learning rate falls to zero at the end."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of the first parameter group at each step; call it with a step to get its rate.

    Attributes:
        lrs: one learning rate per step, shape [T].
    """

    lrs: tuple[float, ...]

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step`, from 0; after the last step, the last one's.

        Raises:
            ValueError: the step is negative, or the schedule has no steps.
        """
        if step < 0 or not self.lrs:
            raise ValueError(f"step={step}: the schedule has the steps 0 to {len(self.lrs) - 1}.")
        return self.lrs[min(step, len(self.lrs) - 1)]

    def __len__(self) -> int:
        return len(self.lrs)

    def stretched(self, steps: int) -> "Schedule":
        """Return the same curve over another number of steps, linearly interpolated.

        Raises:
            ConfigError: `steps` is below 1, or the schedule has no steps.
        """
        if steps < 1 or not self.lrs:
            raise ConfigError(f"steps={steps!r}: must be at least 1, of a schedule that has steps.")
        last, scale = len(self.lrs) - 1, (len(self.lrs) - 1) / max(1, steps - 1)
        positions = [min(last, t * scale) for t in range(steps)]
        lower = [min(int(p), max(0, last - 1)) for p in positions]
        return Schedule(
            tuple(
                (1 - (p - i)) * self.lrs[i] + (p - i) * self.lrs[min(i + 1, last)]  # exact at both ends
                for p, i in zip(positions, lower, strict=True)
            )
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the schedule as plain values; `from_mapping` takes them back."""
        return {"kind": "autolrs-schedule", "version": VERSION, "lrs": list(self.lrs)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "schedule") -> "Schedule":
        """Build a schedule from plain values; `origin` names their source in errors.

        Raises:
            ConfigError: the values are no schedule of this version, or a learning rate is no number >= 0.
        """
        if values.get("kind") != "autolrs-schedule" or values.get("version") != VERSION:
            raise ConfigError(f"{origin}: is no autolrs schedule of version {VERSION}.")
        lrs = values.get("lrs")
        if not isinstance(lrs, list | tuple) or not lrs:
            raise ConfigError(f"{origin}: 'lrs' must be a list of learning rates, one per step.")
        for step, lr in enumerate(lrs):
            good = isinstance(lr, int | float) and not isinstance(lr, bool)
            if not good or not math.isfinite(lr) or lr < 0:
                raise ConfigError(f"{origin}: the learning rate of step {step} is {lr!r}, not a number >= 0.")
        return cls(tuple(float(lr) for lr in lrs))

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON, whole or not at all."""
        with written_whole(Path(path), lasting=False) as scratch:
            scratch.write_text(json.dumps(self.to_mapping()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a schedule that `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds no schedule.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(path)!r}: cannot be read as a schedule ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{str(path)!r}: must hold a JSON object, not {type(values).__name__}.")
        return cls.from_mapping(values, origin=repr(str(path)))


def unit_curve(
    step: int, steps: int, warmup_steps: int, final_decay: bool = True, decay_steps: int | None = None
) -> float:
    """Return the share of the peak at `step` of T = `steps`, in (0, 1]: linear warm-up, plateau, linear to zero.

    The decay reaches zero one step after the last, so that no step is wasted on a rate of zero
    (Defazio et al. 2023, "Optimal linear decay learning rate schedules and further refinements").

    Args:
        decay_steps: length of the decay; by default all that comes after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if not final_decay:
        return 1.0
    after = steps - warmup_steps
    return min(1.0, (steps - step) / (after if decay_steps is None else max(1, min(decay_steps, after))))


def warmup_steps(config: AutoLRSConfig) -> int:
    """Return the number of warm-up steps of a run; at least one step is left after them."""
    return min(config.max_steps - 1, round(config.warmup * config.max_steps))


def ramp_steps(config: AutoLRSConfig) -> int:
    """Return the number of steps over which a run goes to a new rate."""
    return max(1, config.max_steps // 100)


def phases(config: AutoLRSConfig) -> dict[str, int]:
    """Return the steps of each phase of a run of the default plan, in order: warm-up, plateau and decay."""
    warmup = warmup_steps(config)
    after = config.max_steps - warmup
    decay = max(1, min(_decay_steps(config), after)) if config.final_decay else 0
    return {"warm-up": warmup, "plateau": after - decay, "decay": decay}


def _decay_steps(config: AutoLRSConfig) -> int:
    return round(DECAY * config.max_steps)


def curve_of(config: AutoLRSConfig) -> Callable[[int], float]:
    """Return what gives the share of its peak that a run of the default plan has at a step."""
    return partial(
        unit_curve,
        steps=config.max_steps,
        warmup_steps=warmup_steps(config),
        final_decay=config.final_decay,
        decay_steps=_decay_steps(config),
    )


def run_curve(step: int, config: AutoLRSConfig) -> float:
    """Return that share at one step."""
    return curve_of(config)(step)


def preview(config: AutoLRSConfig, peak_lr: float | None = None) -> Schedule:
    """Return the schedule that a run would follow at this peak, without training anything.

    Args:
        peak_lr: the peak that a search might find; without one, the middle of `lr_range` on the log scale.
    """
    peak = math.sqrt(config.lr_range[0] * config.lr_range[1]) if peak_lr is None else peak_lr
    curve = curve_of(config)
    return Schedule(tuple(peak * curve(t) for t in range(config.max_steps)))
