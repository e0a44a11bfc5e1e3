"""Property tests of the SLO-driven budget in the real scheduler: no input, clock or history breaks a step."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.properties import REPEATABLE
from tests.engine.step_order import check_stall_free
from tests.engine.test_step_order import BLOCKS_FOR_ONE, MAX_MODEL_LEN, PROGRAM, DuplicatePlay
from vllm_sarathi import SarathiConfig
from vllm_sarathi.testing.modelled import ModelledEngine, Step

SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "gap": {"tbt_slo_ms": 100},
    "pace": {"tbt_slo_ms": 100, "tbt_mode": "pace"},
    "deadline": {"tbt_slo_ms": 100, "prefill_order": "deadline", "ttft_slo_ms": 500},
    "deadline-auto": {"prefill_order": "deadline", "prefill_max_wait_s": 1},
    "unattainable": {"tbt_slo_ms": 0.1, "prefill_order": "deadline"},
    "own-slo": {"tbt_slo_ms": 100, "allow_request_slo": True, "prefill_order": "deadline"},
}

ODD = (None, "fast", float("nan"), -1, 0, 2**64 - 1, True, [30], {"ms": 30}, 5, 30.5, float("inf"))


class BrokenClock:
    """A clock that mostly runs, sometimes stands, leaps, goes back or gives no number."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1000.0

    def __call__(self) -> float:
        kind = self.rng.random()
        if kind < 0.02:
            return float("nan")
        self.now_s += self.rng.choice((0.0, 0.001, 0.02, 0.02, 0.05, 3600.0 if kind < 0.05 else 0.01))
        return self.now_s - (100.0 if kind > 0.98 else 0.0)


class SloPlay(DuplicatePlay):
    """Checks what holds whatever the budget is: bounds, no decode left out, nothing raised."""

    def check(self, step: Step) -> None:
        if not step.preempted:
            check_stall_free(self.engine, step, self.budget)


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_clock_and_no_history_breaks_a_step(make_config: Any, mode: str, name: str) -> None:
    steps = 0

    @settings(REPEATABLE, max_examples=40)
    @given(
        program=PROGRAM,
        blocks=st.one_of(st.integers(BLOCKS_FOR_ONE, 30), st.just(400)),
        seed=st.integers(0, 1000),
    )
    def run(program: list[Any], blocks: int, seed: int) -> None:
        nonlocal steps
        config = make_config(SarathiConfig(**SETTINGS[name]), mode)
        engine = ModelledEngine(config, num_blocks=blocks, in_flight=1 if mode == "sync" else 2)
        play = SloPlay(engine, MAX_MODEL_LEN)
        engine.scheduler.clock = engine.scheduler.wall_clock = BrokenClock(seed)
        rng = random.Random(seed)
        add = engine.add

        def add_with_odd_slos(*args: Any, **fields: Any) -> Any:
            odd = {"tbt_slo_ms": rng.choice(ODD), "ttft_slo_ms": rng.choice(ODD)}
            return add(*args, sampling={"extra_args": rng.choice((odd, None, {}))}, **fields)

        engine.add = add_with_odd_slos  # type: ignore[method-assign]
        play.play(program)
        steps += play.steps

    run()
    assert steps >= 500
