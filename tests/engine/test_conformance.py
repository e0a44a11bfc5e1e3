"""The conformance suite: whatever a policy prefers, it moves, it keeps to memory and budget, and everybody finishes.

Real requests, the real scheduler and KV-cache manager, a modelled executor; `tests/engine/real/test_policies.py` is
the same on the real engine.
"""

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.modelled import ModelledEngine, Step
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.config import SCHEDULERS
from vllm_sarathi.engine.scheduler import EMPTY_STEPS_BEFORE_FULL_BUDGET

MAX_MODEL_LEN = 256
LIMIT = 256
BLOCKS_FOR_ONE = MAX_MODEL_LEN // 16 + 2

POLICIES: dict[str, SarathiConfig] = {
    **{name: SarathiConfig(scheduler=name) for name in SCHEDULERS if name != "sarathi"},
    "sarathi": SarathiConfig(tbt_slo_ms=50.0),
    "pace": SarathiConfig(tbt_slo_ms=50.0, tbt_mode="pace"),
    "deadline": SarathiConfig(tbt_slo_ms=50.0, prefill_order="deadline", ttft_slo_ms=200.0),
    "auto": SarathiConfig(),
    "fixed": SarathiConfig(token_budget=40),
    "chunked-only@40": SarathiConfig(scheduler="chunked-only", token_budget=40),
    "prefill-first@40": SarathiConfig(scheduler="prefill-first", token_budget=40),
    "orca@40": SarathiConfig(scheduler="orca", token_budget=40),
    "request-level@40": SarathiConfig(scheduler="request-level", token_budget=40),
}

ADD = st.tuples(st.just("add"), st.one_of(st.integers(1, 20), st.integers(1, 255)), st.integers(1, 24))
STEP = st.tuples(st.just("step"), st.integers(1, 12), st.just(0))
ABORT = st.tuples(st.just("abort"), st.integers(0, 30), st.just(0))
PROGRAM = st.lists(st.one_of(ADD, ADD, STEP, ABORT), min_size=6, max_size=30)


class Play:
    """Runs a program of requests on an engine, and checks each step."""

    def __init__(self, config: Any, blocks: int, in_flight: int, budget: int) -> None:
        self.engine = ModelledEngine(config, num_blocks=blocks, in_flight=in_flight)
        self.budget = budget
        self.lengths: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.steps: list[Step] = []
        self.idle_steps = 0
        self.now_s = 0.0
        scheduler = self.engine.scheduler
        if hasattr(scheduler, "wall_clock"):
            scheduler.clock = scheduler.wall_clock = lambda: self.now_s

    def run(self, program: list[tuple[str, int, int]]) -> None:
        free = self._free_blocks()
        for kind, a, b in program:
            if kind == "add":
                name = f"r{len(self.lengths)}"
                self.lengths[name] = min(b, MAX_MODEL_LEN - a)
                self.engine.add(name, a, self.lengths[name], arrival_s=self.now_s)
            elif kind == "step":
                for _ in range(a):
                    self.step()
            elif self.lengths:
                name = f"r{a % len(self.lengths)}"
                if name not in self.engine.finished:
                    self.engine.abort(name)
                    self.aborted.add(name)
        for _ in range(20_000):
            if self.engine.idle():
                break
            self.step()
        self._check_the_end(free)

    def step(self) -> None:
        scheduler = self.engine.scheduler
        limits = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
        busy = bool(self.engine.queue)
        step = self.engine.step()
        self.now_s += 0.001 * (1 + sum(step.scheduled.values()))
        self.steps.append(step)
        assert sum(step.scheduled.values()) <= self.budget, "over budget"
        assert (scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs) == limits, "not restored"
        assert len(scheduler.running) <= scheduler.max_num_running_reqs
        names = [r.request_id for r in (*scheduler.running, *scheduler.waiting)]
        assert len(names) == len(set(names)), "a request is in two places"
        waits = scheduler.has_unfinished_requests() and not busy
        self.idle_steps = self.idle_steps + 1 if waits and not step.scheduled else 0
        assert self.idle_steps < EMPTY_STEPS_BEFORE_FULL_BUDGET, "no progress"

    def _check_the_end(self, free: int) -> None:
        engine = self.engine
        assert set(engine.finished) | self.aborted == set(self.lengths), "somebody never finished"
        assert not engine.scheduler.requests
        assert not engine.scheduler.running
        assert self._free_blocks() == free, "KV blocks are still held"
        if hasattr(engine.scheduler, "faults"):
            assert engine.scheduler.faults.total == 0

    def _free_blocks(self) -> int:
        return int(self.engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def budget_of(config: SarathiConfig) -> int:
    """Return the most tokens that a policy may take in a step."""
    return config.token_budget or LIMIT


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_moves_and_finishes_with_the_tokens_of_stock(
    make_config: Any, policy: str, mode: str
) -> None:
    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(program=PROGRAM, blocks=st.one_of(st.integers(BLOCKS_FOR_ONE, 30), st.just(400)))
    def run(program: list[tuple[str, int, int]], blocks: int) -> None:
        in_flight = 1 if mode == "sync" else 2
        config = POLICIES[policy]
        ours = Play(make_config(config, mode), blocks, in_flight, budget_of(config))
        ours.run(program)
        stock = Play(make_config(None, mode), blocks, in_flight, LIMIT)
        stock.run(program)
        for name in ours.lengths.keys() - ours.aborted - stock.aborted:
            assert ours.engine.outputs[name] == stock.engine.outputs[name]
            assert len(ours.engine.outputs[name]) == ours.lengths[name]

    run()


# --- What makes each policy what it is ---


def steps_of(make_config: Any, policy: str) -> list[Step]:
    """Return the steps of a scene with room for everybody: streams, among which long prompts come."""
    config = POLICIES[policy]
    play = Play(make_config(config, "sync"), 400, 1, budget_of(config))
    for i in range(4):
        play.lengths[f"stream{i}"] = 60
        play.engine.add(f"stream{i}", 5 + i, 60)
    for _ in range(3):
        play.step()
    for i, length in enumerate((150, 90, 200, 30)):
        play.lengths[f"long{i}"] = 8
        play.engine.add(f"long{i}", length, 8)
        for _ in range(2):
            play.step()
    while not play.engine.idle():
        play.step()
    play._check_the_end(play._free_blocks())
    return play.steps


def prompt_tokens(step: Step) -> int:
    return sum(n for name, n in step.scheduled.items() if name not in step.decodes_allowed)


def served_decodes(step: Step) -> int:
    return sum(name in step.scheduled for name in step.decodes_allowed)


def hybrid(steps: list[Step]) -> list[Step]:
    return [s for s in steps if prompt_tokens(s) and served_decodes(s)]


def cut(steps: list[Step]) -> bool:
    """True where a prompt was read in more than one step."""
    return any(step.partial_before for step in steps)


def test_prefill_first_stalls_the_decodes_and_cuts_nothing(make_config: Any) -> None:
    steps = steps_of(make_config, "prefill-first")
    assert not hybrid(steps)
    assert not cut(steps)
    assert any(prompt_tokens(s) and s.decodes_allowed for s in steps)


def test_orca_reads_whole_prompts_beside_the_decodes(make_config: Any) -> None:
    steps = steps_of(make_config, "orca")
    assert not cut(steps)
    assert all(served_decodes(s) == len(s.decodes_allowed) for s in hybrid(steps))
    assert any(prompt_tokens(s) > 100 for s in hybrid(steps))


def test_request_level_lets_nobody_in_while_somebody_decodes(make_config: Any) -> None:
    steps = steps_of(make_config, "request-level")
    assert not hybrid(steps)
    assert not any(step.admitted and step.decodes_allowed for step in steps)


def test_chunked_only_takes_turns(make_config: Any) -> None:
    steps = steps_of(make_config, "chunked-only@40")
    assert not hybrid(steps)
    assert cut(steps)
    reading = [bool(prompt_tokens(s)) for s in steps if s.decodes_allowed and s.partial_before]
    assert True in reading
    assert False in reading
    assert not any(a and b for a, b in itertools.pairwise(reading))


def test_hybrid_only_cuts_nothing_that_fits_the_engines_limit(make_config: Any) -> None:
    steps = steps_of(make_config, "hybrid-only")
    assert not cut(steps)
    assert all(served_decodes(s) == len(s.decodes_allowed) for s in hybrid(steps))


def test_pressure_has_two_levels(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sarathi.core.policies.pressure import Pressure

    monkeypatch.setattr(Pressure, "prefill_tokens", 50)  # 2,048 is beyond this small engine's limit
    config = POLICIES["pressure"]
    play = Play(make_config(config, "sync"), 400, 1, LIMIT)
    play.lengths = {"stream": 60, "one": 4, "two": 4, "three": 4}
    play.engine.add("stream", 5, 60)
    play.step()
    play.engine.add("one", 200, 4)  # alone: as much as the engine takes
    play.step()
    assert prompt_tokens(play.steps[-1]) == 200
    play.engine.add("two", 200, 4)
    play.engine.add("three", 200, 4)  # two press: 50 at a time
    play.step()
    assert prompt_tokens(play.steps[-1]) == 50
    while not play.engine.idle():
        play.step()
    play._check_the_end(play._free_blocks())


def test_a_policy_that_lets_nobody_in_fails_the_suite(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sarathi.core.policies.orca import Orca
    from vllm_sarathi.core.policy import decodes_only

    monkeypatch.setattr(Orca, "plan", lambda self, view, turn: decodes_only(view))
    play = Play(make_config(POLICIES["orca"], "sync"), 400, 1, LIMIT)
    with pytest.raises(AssertionError, match="no progress"):
        play.run([("add", 20, 4)])
