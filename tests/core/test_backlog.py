"""Who waits for a step: counted over busy periods."""

import numpy as np
import pytest

from vllm_sarathi.core.limits.backlog import KNOWN_PERIODS, Backlog


def play(backlog: Backlog, prompts: int) -> None:
    """A busy period in which each step reads one prompt."""
    for left in range(prompts - 1, -1, -1):
        backlog.planned(1, left)
    backlog.planned(0, 0)


def test_before_anything_is_known_a_period_is_at_its_half() -> None:
    backlog = Backlog()
    assert backlog.delayed(3) == 3
    for _ in range(10):
        backlog.planned(1, 3)
    assert backlog.delayed(3) == 10


def test_bursts_of_one_size_are_paid_by_those_that_are_left_alone() -> None:
    backlog = Backlog()
    for _ in range(KNOWN_PERIODS):
        play(backlog, 16)
    for left in range(15, 0, -1):
        backlog.planned(1, left)
        assert backlog.delayed(left) == left


def test_under_load_those_that_will_come_pay_too() -> None:
    backlog = Backlog()
    for prompts in (1, 2, 1, 40, 1, 3):
        play(backlog, prompts)
    backlog.planned(1, 1)
    assert backlog.delayed(1) > 10


def test_in_a_first_period_those_count_that_come_as_it_goes_on() -> None:
    burst, stream = Backlog(), Backlog()
    for i in range(20):
        burst.planned(1, 40 - i)
        stream.planned(1, 8)
    assert burst.delayed(21) == 21  # nobody came
    assert 30 < stream.delayed(8) < 60  # one came for each, and may go on to; 20 is its half


def test_a_period_longer_than_all_before_it_is_at_its_half() -> None:
    backlog = Backlog()
    for _ in range(KNOWN_PERIODS):
        play(backlog, 2)
    for _ in range(30):
        backlog.planned(1, 2)
    assert backlog.delayed(2) == 30


@pytest.mark.parametrize("load", [0.3, 0.9])
def test_the_count_is_that_of_a_queue(load: float) -> None:
    """Against a simulated queue: how many are read after a step, on average over steps, before it is empty."""
    rng = np.random.default_rng(0)
    backlog, waiting = Backlog(), 0
    said: list[float] = []
    periods: list[list[int]] = [[]]
    for _ in range(200_000):
        waiting += int(rng.poisson(load))
        if not waiting:
            backlog.planned(0, 0)
            periods.append([])
            continue
        waiting -= 1
        backlog.planned(1, waiting)
        said.append(backlog.delayed(waiting))
        periods[-1].append(1)
    truth = [len(period) - 1 - i for period in periods for i in range(len(period))]
    assert 0.5 < np.mean(said) / np.mean(truth) < 2.5
