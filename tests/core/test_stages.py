"""The time of a stage, from when batches go into a pipeline and come out of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sarathi.core.steptime.stages import LONGEST_WITHIN, StageClock
from vllm_sarathi.core.types import InFlight


class Pipeline:
    """Stages one behind another, each with one batch at a time: the truth that the clock is to find."""

    def __init__(self, stages: int) -> None:
        self.free_at_s = [0.0] * stages

    def send(self, started_s: float, stage_s: float) -> float:
        """Return when the batch comes out."""
        at_s = started_s
        for k, free_s in enumerate(self.free_at_s):
            at_s = max(at_s, free_s) + stage_s
            self.free_at_s[k] = at_s
        return at_s


TIMES = st.lists(st.floats(0.01, 2.0), min_size=1, max_size=30)


@given(stages=st.integers(2, 5), times=TIMES, pauses=st.data())
def test_the_time_of_a_stage_is_found_whatever_is_beside_it(
    stages: int, times: list[float], pauses: st.DataObject
) -> None:
    pipeline, clock = Pipeline(stages), StageClock(stages)
    out_s: list[float] = []
    for i, stage_s in enumerate(times):
        # As an engine does: a batch goes in when one comes out, or later.
        free_s = out_s[i - stages] if i >= stages else 0.0
        started_s = max(free_s, out_s[i - stages - 1] if i > stages else 0.0)
        started_s += pauses.draw(st.floats(0.0, 1.0))
        out_s.append(pipeline.send(started_s, stage_s))
        assert clock.seconds(started_s, out_s[-1]) == pytest.approx(stage_s, rel=1e-6)


def test_a_bubble_is_not_taken_for_work() -> None:
    pipeline, clock = Pipeline(2), StageClock(2)
    short_out = pipeline.send(0.0, 0.1)
    clock.seconds(0.0, short_out)
    long_out = pipeline.send(0.0, 1.0)
    assert long_out - short_out > 1.5  # what lies between the completions
    assert clock.seconds(0.0, long_out) == pytest.approx(1.0)


def gaps(first: list[tuple[float, float]], stage_s: float, count: int = 6) -> list[float]:
    """Return the gaps of the requests in batches of `stage_s` that follow those inside a pipeline of two."""
    pipeline = Pipeline(2)
    out = [pipeline.send(started_s, seconds) for started_s, seconds in first]
    for _ in range(count):
        out.append(pipeline.send(out[-2], stage_s))
    return [late - early for early, late in zip(out, out[2:], strict=False)]


@given(before_s=st.floats(0.02, 0.5), inside_s=st.floats(0.02, 0.5))
def test_the_longest_batch_keeps_the_slo_and_a_longer_one_would_not(before_s: float, inside_s: float) -> None:
    slo_s, clock, pipeline = 1.0, StageClock(2), Pipeline(2)
    now_s = pipeline.send(0.0, before_s)
    clock.seconds(0.0, now_s)
    inside = [InFlight(0.0, inside_s)]

    longest_s = clock.longest_s(now_s, now_s + slo_s, slo_s, inside)

    first = [(0.0, before_s), (0.0, inside_s)]
    assert longest_s <= slo_s / 2
    if longest_s > 0:
        assert max(gaps(first, longest_s)[:2]) <= slo_s + 1e-9
    if longest_s < slo_s / 2:
        assert max(gaps(first, longest_s + 2 * LONGEST_WITHIN * slo_s)[:2]) > slo_s


def test_in_a_steady_pipeline_each_batch_has_its_part_of_the_slo() -> None:
    clock, pipeline = StageClock(2), Pipeline(2)
    starts, now_s = [0.0, 0.0], 0.0
    for i in range(6):
        now_s = pipeline.send(starts[i], 0.5)
        clock.seconds(starts[i], now_s)
        starts.append(now_s)
    inside = [InFlight(starts[6], 0.5)]
    assert clock.longest_s(now_s, now_s + 1.0, 1.0, inside) == pytest.approx(0.5, abs=2e-3)


def test_without_decodes_of_its_own_a_batch_is_bounded_by_those_behind_it() -> None:
    clock = StageClock(2)
    clock.seconds(0.0, 0.1)
    inside = [InFlight(0.05, 0.05)]
    longest_s = clock.longest_s(0.1, math.inf, 1.0, inside)
    assert 0 < longest_s < 0.5
    assert clock.longest_s(0.1, math.inf, 2.0, inside) > longest_s
