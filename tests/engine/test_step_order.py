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
from vllm_sarathi.testing.rules import StepRules

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


class Play:
    """Runs a random program against an engine and checks each step."""

    def __init__(self, engine: ModelledEngine, budget: int) -> None:
        self.engine = engine
        self.budget = budget
        self.steps = 0
        self.names: list[str] = []
        self.aborted: set[str] = set()
        self.unserved: Counter[str] = Counter()
        self.rules = StepRules(engine.scheduler, budget)

    def run(self, program: list[tuple[str, int, int, int]]) -> None:
        for kind, a, b, c in program:
            if kind == "step":
                for _ in range(a):
                    self.step()
            elif kind == "add":
                self.names.append(f"r{len(self.names)}")
                self.engine.add(self.names[-1], a, min(b, MAX_MODEL_LEN - a), priority=c)
            elif self.names:
                name = self.names[a % len(self.names)]
                if kind == "abort" and name not in self.engine.finished:
                    self.engine.abort(name)
                    self.aborted.add(name)
                elif kind == "duplicate" and name in self.engine.scheduler.requests:
                    self.engine.add(name, b, 4)
        self.drain()

    def step(self) -> None:
        step = self.take()
        check_step(self.engine, step, self.budget)
        for name in step.decodes_allowed:
            self.unserved[name] = 0 if name in step.scheduled else self.unserved[name] + 1
            turns = math.ceil(len(step.decodes_allowed) / self.budget)
            # A preemption or a batch in flight may cost a turn or two.
            assert self.unserved[name] <= 2 * turns + 4, f"{name} starves"

    def take(self) -> Step:
        """Take a step, and check what holds of any."""
        step = self.engine.step()
        self.steps += 1
        self.rules.check_step(step)
        return step

    def drain(self) -> None:
        engine = self.engine
        work = sum(r.num_prompt_tokens + r.max_tokens for r in engine.scheduler.requests.values())
        for _ in range(40 * work + 100):
            if engine.idle():
                break
            self.step()
        done = set(engine.finished) | self.aborted
        assert done >= set(self.names), f"starved: {set(self.names) - done}"
        self.rules.check_end()


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
        player = Play(engine, budget)
        player.run(program)
        steps += player.steps

    run()
    assert steps >= 2_000  # so the eleven setups make more than 20,000 steps
