"""A half-read prompt yields its turn only to one that can use it."""

from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState

from tests.engine.cases.conftest import OURS, MakeEngine, warm_up
from tests.engine.virtual import VirtualEngine
from vllm_sarathi import SarathiConfig

LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
WORST_TTFT = 1.2
"""TTFT over stock's."""

cold_and_warm = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
in_every_order = pytest.mark.parametrize("order", OURS)


def adapter(number: int) -> LoRARequest:
    return LoRARequest(f"adapter{number}", number, f"/adapters/{number}")


def chats_and_a_half_read_prompt(
    engine: VirtualEngine, warm: bool, chats: int = 3, **chat_fields: Any
) -> None:
    """Let chats decode, and a long prompt come that is read by a part."""
    for number in range(chats):
        engine.add(f"chat{number}", 40, max_tokens=1500, **chat_fields)
    engine.run(40)
    if warm:
        warm_up(engine)


def unread_steps(engine: VirtualEngine, name: str) -> int:
    """Return in how many steps a request got no token, from its first one until its answer began."""
    answered_s = engine.token_s[name][0] if engine.token_s[name] else engine.now_s
    started_s = engine.first_scheduled_s[name]
    return sum(
        started_s <= step.started_s < answered_s and name not in step.scheduled for step in engine.steps
    )


@cold_and_warm
@in_every_order
def test_all_slots_are_taken(make_engine: MakeEngine, order: str, warm: bool) -> None:
    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, max_num_seqs=4)
        chats_and_a_half_read_prompt(engine, warm)
        engine.add("long", 6000, max_tokens=20)
        engine.run(4)
        engine.add("short", 40, max_tokens=20)
        engine.run_until_answered("long", most_s=100)
        assert unread_steps(engine, "long") == 0
        return engine.ttft_s("long")

    assert ttft_s(OURS[order]) <= WORST_TTFT * ttft_s(None)


@cold_and_warm
@in_every_order
def test_a_grammar_is_still_compiled(make_engine: MakeEngine, order: str, warm: bool) -> None:
    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi)
        chats_and_a_half_read_prompt(engine, warm)
        engine.add("long", 6000, max_tokens=20)
        engine.run(4)
        grammar = {"structured_outputs": StructuredOutputsParams(json={"type": "object"})}
        engine.add("json", 40, max_tokens=20, sampling=grammar)
        engine.run_until_answered("long", most_s=100)
        assert unread_steps(engine, "long") == 0
        return engine.ttft_s("long")

    assert ttft_s(OURS[order]) <= WORST_TTFT * ttft_s(None)


def test_a_grammar_that_is_ready_gets_its_turn(make_engine: MakeEngine) -> None:
    """The other side: a short prompt that can run goes before a long one that is half read."""
    engine = make_engine(OURS["deadline"])
    chats_and_a_half_read_prompt(engine, warm=True)
    engine.add("long", 6000, max_tokens=20)
    engine.run(4)
    engine.add("short", 40, max_tokens=20)
    engine.run_until_answered("short", "long", most_s=100)
    assert engine.token_s["short"][0] < engine.token_s["long"][0]
    assert engine.ttft_s("short") < 0.5


@cold_and_warm
@in_every_order
def test_an_adapter_of_a_half_read_prompt_keeps_its_slot(
    make_engine: MakeEngine, order: str, warm: bool
) -> None:
    """One adapter at a time (vLLM's default): both prompts in one step would end the engine."""

    def first_tokens_s(sarathi: SarathiConfig | None) -> list[float]:
        engine = make_engine(sarathi, **LORA)
        chats_and_a_half_read_prompt(engine, warm, chats=1)
        engine.add("longA", 6000, max_tokens=20, lora_request=adapter(1))
        engine.run(4)
        engine.add("shortB", 40, max_tokens=200, lora_request=adapter(2))
        engine.run_until_answered("longA", "shortB", most_s=100)
        return [engine.token_s[name][0] - engine.arrived_s["longA"] for name in ("longA", "shortB")]

    for ours_s, stock_s in zip(first_tokens_s(OURS[order]), first_tokens_s(None), strict=True):
        assert ours_s <= WORST_TTFT * stock_s


@pytest.mark.parametrize(
    "name", ["prefill-first", "chunked-only", "hybrid-only", "orca", "request-level", "pressure"]
)
def test_adapters_end_no_baseline(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine(SarathiConfig(scheduler=name, calibration_dir="none"), **LORA)
    for number in range(6):
        engine.add(f"r{number}", 700 + 100 * number, max_tokens=30, lora_request=adapter(1 + number % 3))
        engine.run(2)
    assert engine.run_until(lambda: len(engine.finished_s) == 6, most_s=200)


@cold_and_warm
@in_every_order
def test_an_adapter_without_a_slot(make_engine: MakeEngine, order: str, warm: bool) -> None:
    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, **LORA)
        engine.add("chatA", 40, max_tokens=3000, lora_request=adapter(1))
        engine.run(40)
        if warm:
            warm_up(engine)
        engine.add("long", 6000, max_tokens=20)
        engine.run(4)
        engine.add("shortB", 40, max_tokens=20, lora_request=adapter(2))
        engine.run_until_answered("long", most_s=100)
        assert unread_steps(engine, "long") == 0
        return engine.ttft_s("long")

    assert ttft_s(OURS[order]) <= WORST_TTFT * ttft_s(None)


@pytest.mark.parametrize("chats", [0, 1])
@pytest.mark.parametrize("max_wait_s", [30.0, 600.0])
@in_every_order
def test_a_pausing_engine_drains(make_engine: MakeEngine, order: str, max_wait_s: float, chats: int) -> None:
    """`/pause?mode=wait`: running requests go on to their end, waiting ones stay out."""

    def drained_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi)
        for number in range(chats):
            engine.add(f"chat{number}", 40, max_tokens=400)
        engine.run(30)
        engine.add("long", 8000, max_tokens=20)
        engine.run(1 + chats)
        assert not engine.token_s["long"]
        engine.add("short", 40, max_tokens=20)
        engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        engine.run_until(lambda: not engine.scheduler.has_unfinished_requests(), most_s=100)
        drained = engine.now_s - engine.arrived_s["long"]  # how much of it was read by then differs
        assert "short" not in engine.first_scheduled_s
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        engine.run_until_answered("short", most_s=10)
        assert engine.token_s["short"]
        return drained

    settings = {**OURS[order].to_mapping(), "prefill_max_wait_s": max_wait_s}
    assert drained_s(SarathiConfig(**settings)) <= WORST_TTFT * drained_s(None)


@pytest.mark.parametrize("name", ["sarathi", "chunked-only", "prefill-first"])
def test_an_urgent_prompt_goes_before_a_half_read_one_of_low_priority(
    make_engine: MakeEngine, name: str
) -> None:
    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, scheduling_policy="priority")
        chats_and_a_half_read_prompt(engine, warm=True)
        engine.add("long", 6000, max_tokens=20, priority=5)
        engine.run(4 if sarathi else 1)  # stock reads it in three steps
        engine.add("urgent", 40, max_tokens=20, priority=0)
        engine.run_until_answered("urgent", most_s=100)
        return engine.ttft_s("urgent")

    ours = OURS["fcfs"] if name == "sarathi" else SarathiConfig(scheduler=name, calibration_dir="none")
    assert ttft_s(ours) <= WORST_TTFT * ttft_s(None)
