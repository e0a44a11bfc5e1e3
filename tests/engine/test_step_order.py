"""Property tests of a fixed budget: whatever clients send, no exception, and each step is in order."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.properties import REPEATABLE
from tests.engine.step_order import check_step
from vllm_sarathi import SarathiConfig
from vllm_sarathi.testing.modelled import NGRAM, ModelledEngine, Step
from vllm_sarathi.testing.play import RequestPlay

MAX_MODEL_LEN = 256
BLOCKS_FOR_ONE = MAX_MODEL_LEN // 16 + 2

ADD = st.tuples(
    st.just("add"),
    st.one_of(st.integers(1, 20), st.integers(1, MAX_MODEL_LEN - 1)),
    st.integers(1, 24),
    st.integers(-2, 2),
)
STEP = st.tuples(st.just("step"), st.integers(1, 12), st.just(0), st.just(0))
ABORT = st.tuples(st.just("abort"), st.integers(0, 30), st.just(0), st.just(0))
DUPLICATE = st.tuples(st.just("duplicate"), st.integers(0, 30), st.integers(1, 50), st.just(0))
PROGRAM = st.lists(st.one_of(ADD, ADD, STEP, STEP, ABORT, DUPLICATE), min_size=8, max_size=40)


class DuplicatePlay(RequestPlay):
    """Sends some names again, and allows as many steps to the end as the work that is left may take.

    Args:
        engine: as RequestPlay's.
        budget: the most tokens of a step.
    """

    def __init__(self, engine: ModelledEngine, budget: int) -> None:
        super().__init__(engine, budget)
        self.budget = budget

    def happen(self, event: Any) -> None:
        kind, a, b, _ = event
        if kind != "duplicate":
            super().happen(event)
        elif (name := self.name_of(a)) in self.scheduler.requests:
            assert name is not None
            self.engine.add(name, b, 4)

    def most_steps_to_end(self) -> int:
        work = sum(r.num_prompt_tokens + r.max_tokens for r in self.scheduler.requests.values())
        return 40 * work + 100


class FixedPlay(DuplicatePlay):
    """Checks the order of each step of a fixed budget, and that no decode starves."""

    def __init__(self, engine: ModelledEngine, budget: int) -> None:
        super().__init__(engine, budget)
        self.unserved: Counter[str] = Counter()

    def check(self, step: Step) -> None:
        check_step(self.engine, step, self.budget)
        for name in step.decodes_allowed:
            self.unserved[name] = 0 if name in step.scheduled else self.unserved[name] + 1
            turns = math.ceil(len(step.decodes_allowed) / self.budget)
            # A preemption or a batch in flight may cost a turn or two.
            assert self.unserved[name] <= 2 * turns + 4, f"{name} starves"


SETUPS: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "priority": {"scheduling_policy": "priority"},
    "several-partial": {"long_prefill_token_threshold": 5},
    "speculative": {"speculative_config": NGRAM},
    "speculative-several-partial": {"speculative_config": NGRAM, "long_prefill_token_threshold": 4},
}


def drafts(name: str, position: int) -> list[int]:
    """Return draft tokens of which the first few are right, how many depending on the position."""
    right = [ModelledEngine.token(name, position + i) for i in range(3)]
    good = position % 4
    return right[:good] + [(t + 1) % 512 for t in right[good:]]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
def test_every_random_step_is_in_order(make_config: Any, mode: str, setup: str) -> None:
    if "speculative" in setup and mode != "sync":
        pytest.skip("vLLM allows ngram drafts only with one batch in flight")
    steps = 0
    least = 1 + NGRAM["num_speculative_tokens"] if "speculative" in setup else 1

    @settings(REPEATABLE, max_examples=150)
    @given(
        program=PROGRAM,
        budget=st.one_of(st.integers(least, 12), st.integers(least, 256)),
        blocks=st.one_of(st.integers(BLOCKS_FOR_ONE, 30), st.just(400)),
    )
    def run(program: list[Any], budget: int, blocks: int) -> None:
        nonlocal steps
        config = make_config(SarathiConfig(token_budget=budget), mode, **SETUPS[setup])
        engine = ModelledEngine(
            config,
            num_blocks=blocks,
            in_flight=1 if mode == "sync" else 2,
            draft=drafts if "speculative" in setup else None,
        )
        play = FixedPlay(engine, budget)
        play.play(program)
        steps += play.steps

    run()
    assert steps >= 2_000  # so the eleven setups make more than 20,000 steps
