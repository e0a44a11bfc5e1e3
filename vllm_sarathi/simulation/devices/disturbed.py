"""A device that is disturbed: noise in every step, pauses, and a neighbour that comes and goes.

All of it is multiplied onto or added to the step times of any device, and drawn from one seed. Pauses and the
neighbour keep the device's own time, the seconds that it has worked: they fall where there is work to disturb.
"""

import math
import random
from dataclasses import dataclass

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.simulator import StepTimes


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What disturbs a device.

    Attributes:
        noise: standard deviation of the logarithm of a step's time; the mean stays.
        pauses_per_minute: how often a step takes `pause_s` longer, on average.
        pause_s: the least and the greatest pause, seconds; all equally likely.
        neighbour: how many times as long a step takes while a neighbour is there; 1 for none.
        neighbour_s: how long it stays, and how long it stays away, seconds.

    Raises:
        ConfigError: a value out of range.
    """

    noise: float = 0.0
    pauses_per_minute: float = 0.0
    pause_s: tuple[float, float] = (0.02, 0.2)
    neighbour: float = 1.0
    neighbour_s: float = 5.0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("noise", self.noise, 0.0, 1.0),
            ("pauses", self.pauses_per_minute, 0.0, 600.0),
            ("neighbour", self.neighbour, 1.0, 100.0),
        ):
            if not least <= value <= most:
                raise ConfigError(f"--{name} {value!r}: must be a number from {least:g} to {most:g}.")

    @property
    def text(self) -> str:
        """What a table calls it."""
        parts = [f"noise {self.noise:.0%}"] if self.noise else []
        parts += [f"{self.pauses_per_minute:g} pauses a minute"] if self.pauses_per_minute else []
        parts += [f"neighbour x{self.neighbour:g}"] if self.neighbour > 1 else []
        return ", ".join(parts) or "undisturbed"


UNDISTURBED = Disturbance()


def disturbed(times: StepTimes, disturbance: Disturbance, seed: int) -> StepTimes:
    """Return the step times of a device under a disturbance; the same ones where there is none."""
    return times if disturbance == UNDISTURBED else DisturbedTimes(times, disturbance, seed)


class DisturbedTimes:
    """The step times of a device that is disturbed; see `simulator.StepTimes`.

    Args:
        times: of the device left alone.
        disturbance: what disturbs it.
        seed: of every draw.
    """

    def __init__(self, times: StepTimes, disturbance: Disturbance, seed: int = 0) -> None:
        self.stages = times.stages
        self.host_s = times.host_s
        self.host_sequence_s = times.host_sequence_s
        self._times = times
        self._what = disturbance
        self._random = random.Random(seed)
        self._worked_s = 0.0
        self._pause_at_s = self._next_pause_s()

    def _next_pause_s(self) -> float:
        rate = self._what.pauses_per_minute / 60
        return self._worked_s + self._random.expovariate(rate) if rate else math.inf

    def stage_s(self, shape: StepShape, prefix_tokens: int = 0) -> float:
        """Return the seconds that each stage works on a batch."""
        what = self._what
        seconds = self._times.stage_s(shape, prefix_tokens)
        if what.noise:
            seconds *= self._random.lognormvariate(-0.5 * what.noise**2, what.noise)
        # It is away first: a scheduler learns the device alone, and then has company.
        if what.neighbour > 1 and int(self._worked_s / what.neighbour_s) % 2:
            seconds *= what.neighbour
        self._worked_s += seconds
        if self._worked_s >= self._pause_at_s:
            seconds += self._random.uniform(*what.pause_s)
            self._pause_at_s = self._next_pause_s()
        return seconds

    def send_s(self, tokens: int) -> float:
        """Return the seconds to send a batch's activations to the next stage."""
        return self._times.send_s(tokens)
