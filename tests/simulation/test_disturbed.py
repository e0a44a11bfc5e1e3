"""A device that is disturbed: each kind alone, all together, and none at all."""

import numpy as np
import pytest

from tests.simulation.places import EvenTimes
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.simulation.devices.disturbed import UNDISTURBED, Disturbance, disturbed

STEP = StepShape(8, 8, 8000, 0.0, 8)
STEP_S = 0.01


def steps(what: Disturbance, count: int = 60_000, seed: int = 3) -> np.ndarray:
    times = disturbed(EvenTimes(stage_s=STEP_S), what, seed)
    return np.array([times.stage_s(STEP, 0) for _ in range(count)])


def test_noise_is_multiplied_and_leaves_the_mean() -> None:
    ratios = steps(Disturbance(noise=0.05)) / STEP_S
    assert ratios.mean() == pytest.approx(1.0, abs=0.002)
    assert np.log(ratios).std() == pytest.approx(0.05, rel=0.02)
    # Steps are independent of one another.
    assert abs(np.corrcoef(ratios[1:], ratios[:-1])[0, 1]) < 0.02


def test_pauses_come_so_often_and_last_so_long() -> None:
    seconds = steps(Disturbance(pauses_per_minute=4.0))
    pauses = seconds[seconds > STEP_S * 1.001] - STEP_S
    assert len(pauses) == pytest.approx(4 * 600 / 60, rel=0.4)  # 600 s of work
    assert pauses.min() >= 0.02
    assert pauses.max() <= 0.2
    assert pauses.mean() == pytest.approx(0.11, rel=0.25)


def test_a_neighbour_comes_and_goes() -> None:
    seconds = steps(Disturbance(neighbour=1.5, neighbour_s=5.0), count=2000)
    slow = seconds > STEP_S * 1.1
    assert not slow[0]
    assert seconds[slow] == pytest.approx(1.5 * STEP_S)
    changes = np.flatnonzero(np.diff(slow.astype(int)))
    stays_s = np.diff(np.cumsum(seconds)[changes])
    assert len(changes) >= 3
    assert stays_s == pytest.approx(5.0, abs=0.05)


def test_they_come_together_from_one_seed() -> None:
    everything = Disturbance(0.1, 30.0, neighbour=2.0)
    one, same, other = (steps(everything, 3000, seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert not (one == other).all()
    assert one.mean() > 1.3 * STEP_S
    assert everything.text == "noise 10%, 30 pauses a minute, neighbour x2"


def test_a_device_left_alone_is_the_device() -> None:
    device = EvenTimes()
    assert disturbed(device, UNDISTURBED, 0) is device
    two = disturbed(EvenTimes(stages=2, host_s=0.5), Disturbance(noise=0.1), 0)
    assert (two.stages, two.host_s, two.send_s(5)) == (2, 0.5, 0.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"noise": -0.1}, "--noise -0.1"),
        ({"noise": float("nan")}, "--noise nan"),
        ({"noise": 5.0}, "--noise 5.0"),  # a share, not per cent
        ({"pauses_per_minute": -1.0}, "--pauses -1.0"),
        ({"neighbour": 0.5}, "--neighbour 0.5"),
    ],
)
def test_values_out_of_range(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Disturbance(**values)  # type: ignore[arg-type]
