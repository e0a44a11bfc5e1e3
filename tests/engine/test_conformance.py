"""Every policy under the conformance kit, and what makes each what it is.

`tests/engine/real/test_policies.py` is the same on the real engine.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.properties import REPEATABLE
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.config import SCHEDULERS
from vllm_sarathi.core.policies.orca import Orca
from vllm_sarathi.core.policy import decodes_only
from vllm_sarathi.testing import check_policy
from vllm_sarathi.testing.conformance import BLOCKS_FOR_ONE, LIMIT_TOKENS, compare_with_stock
from vllm_sarathi.testing.modelled import ModelledEngine, Step
from vllm_sarathi.testing.play import Event, RequestPlay

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


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_moves_and_finishes_with_the_tokens_of_stock(
    make_config: Any, policy: str, mode: str
) -> None:
    @settings(REPEATABLE, max_examples=25)
    @given(program=PROGRAM, blocks=st.one_of(st.integers(BLOCKS_FOR_ONE, 30), st.just(400)))
    def run(program: list[Event], blocks: int) -> None:
        compare_with_stock(make_config, POLICIES[policy], mode, program, blocks)

    run()


# --- What makes each policy what it is ---


class SeenPlay(RequestPlay):
    """Keeps its steps, of a policy that has room for everybody."""

    def __init__(self, make_config: Any, policy: str) -> None:
        config = POLICIES[policy]
        engine = ModelledEngine(make_config(config, "sync"), num_blocks=400)
        super().__init__(engine, config.token_budget or LIMIT_TOKENS)
        self.seen: list[Step] = []

    def check(self, step: Step) -> None:
        self.seen.append(step)


def steps_of(make_config: Any, policy: str) -> list[Step]:
    """Return the steps of a scene with room for everybody: streams, among which long prompts come."""
    play = SeenPlay(make_config, policy)
    for i in range(4):
        play.add(f"stream{i}", 5 + i, 60)
    for _ in range(3):
        play.step()
    for i, length in enumerate((150, 90, 200, 30)):
        play.add(f"long{i}", length, 8)
        for _ in range(2):
            play.step()
    play.finish()
    return play.seen


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
    play = SeenPlay(make_config, "pressure")
    play.add("stream", 5, 60)
    play.step()
    play.add("one", 200, 4)  # alone: as much as the engine takes
    play.step()
    assert prompt_tokens(play.seen[-1]) == 200
    play.add("two", 200, 4)
    play.add("three", 200, 4)  # two press: 50 at a time
    play.step()
    assert prompt_tokens(play.seen[-1]) == 50
    play.finish()


def test_a_policy_whose_budget_is_no_whole_number_is_said_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Orca.plan

    def fraction(policy: Orca, view: Any, turn: Any) -> Any:
        whole = plan(policy, view, turn)
        return replace(whole, token_budget=whole.token_budget + 0.5)  # type: ignore[arg-type]

    monkeypatch.setattr(Orca, "plan", fraction)
    with pytest.raises(AssertionError, match="has raised an error"):
        check_policy(POLICIES["orca"], runs=1)


def test_a_policy_that_lets_nobody_in_fails_the_suite(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Orca, "plan", lambda self, view, turn: decodes_only(view))
    with pytest.raises(AssertionError, match=r"no progress .*mode 'sync'"):
        check_policy(POLICIES["orca"], runs=1)
