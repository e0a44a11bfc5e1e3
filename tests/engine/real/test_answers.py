"""The same answers as stock's scheduler on the real engine, token for token, whatever is asked of it."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.real.engines import BUDGET, LONG, Pair, RealEngine, Run, prompt

pytestmark = pytest.mark.slow

LENGTHS = (5, LONG, BUDGET, 1, 2 * BUDGET, 200, BUDGET - 1, BUDGET + 1, 17, 400)


def distinct(run: Run) -> int:
    """Return how many different answers a run holds: where it is 1, equal answers prove nothing."""
    return len({tuple(tokens) for tokens in run.tokens.values()})


def test_prompts_longer_and_shorter_than_the_budget(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        for i, length in enumerate(LENGTHS):
            engine.add(f"r{i}", prompt(i, length), max_tokens=16)
            engine.step(2)

    stock, ours = pair.compare(scene)
    assert distinct(ours) == len(LENGTHS)
    assert all(len(tokens) == 16 for tokens in ours.tokens.values())
    assert all(stock.chunks(f"r{i}") == 1 for i in range(len(LENGTHS)))
    for i, length in enumerate(LENGTHS):
        assert ours.chunks(f"r{i}") >= -(-length // BUDGET)
    assert sum(sum(s.scheduled.values()) == BUDGET for s in ours.steps) >= sum(LENGTHS) // BUDGET // 2


def test_decodes_run_in_every_step_while_long_prompts_are_read(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        for i in range(4):
            engine.add(f"stream{i}", prompt(i, 6), max_tokens=40)
        engine.step(2)
        engine.add("long", prompt(10, 400))
        engine.add("longer", prompt(11, 450))

    _, ours = pair.compare(scene)
    assert ours.chunks("long") > 400 // BUDGET
    assert ours.chunks("longer") > 450 // BUDGET
    for step in ours.steps:
        assert step.decodes_before <= step.scheduled.keys()
    assert ours.finished[:4] == [f"stream{i}" for i in range(4)]
