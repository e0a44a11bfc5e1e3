"""The same answers as stock's scheduler on the real engine, token for token, whatever is asked of it."""

import json
import re
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.real.engines import BUDGET, LONG, Pair, RealEngine, Run, prompt
from vllm_sarathi import SarathiConfig

pytestmark = pytest.mark.slow

LENGTHS = (5, LONG, BUDGET, 1, 2 * BUDGET, 200, BUDGET - 1, BUDGET + 1, 17, 400)


def test_prompts_longer_and_shorter_than_the_budget(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        for i, length in enumerate(LENGTHS):
            engine.add(f"r{i}", prompt(i, length), max_tokens=16)
            engine.step(2)

    stock, ours = pair.compare(scene)
    assert ours.distinct == len(LENGTHS)
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


def test_prefix_caching(pair: Pair) -> None:
    shared = prompt(0, 5 * 32)

    def scene(engine: RealEngine) -> None:
        engine.add("cold", shared + prompt(1, 40))
        engine.drain()
        engine.add("warm", shared + prompt(2, 50))
        engine.add("half-warm", shared[:70] + prompt(3, 60))
        engine.add("other", prompt(4, 90))

    stock, ours = pair.compare(scene)
    assert ours.distinct == 4
    assert ours.cached_tokens == stock.cached_tokens == {"cold": 0, "warm": 160, "half-warm": 64, "other": 0}
    assert ours.chunks("cold") > ours.chunks("warm") > 1


def test_the_prefix_of_a_prompt_that_is_still_being_read_is_shared(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        engine.add("first", prompt(0, 300))
        engine.step(5)
        engine.add("second", prompt(0, 300))

    _, ours = pair.compare(scene)
    assert ours.cached_tokens["second"] >= 4 * BUDGET
    assert ours.of("first") == ours.of("second")


def test_several_samples_of_a_prompt(pair: Pair) -> None:
    # vLLM on a CPU cannot rewind a seeded request's generator after a piece of its prompt, under any scheduler
    # ("CPU Generator does not use offset"): so the seeded prompt is short, and the long one needs no seed.
    def scene(engine: RealEngine) -> None:
        engine.add("seeded", prompt(1, 5), n=3, temperature=1.0, seed=7)
        engine.step()
        engine.add("long", prompt(2, LONG), n=2, temperature=1.0, top_k=1)
        engine.add("greedy", prompt(2, LONG))

    _, ours = pair.compare(scene)
    assert set(ours.tokens) == {*(("seeded", i) for i in range(3)), ("long", 0), ("long", 1), ("greedy", 0)}
    assert len({tuple(ours.tokens["seeded", i]) for i in range(3)}) == 3
    assert ours.tokens["long", 0] == ours.tokens["long", 1] == ours.of("greedy")
    assert ours.chunks("0_long") > 3


def test_tokens_stream_one_by_one_and_in_order(pair: Pair) -> None:
    """What the engine hands out at each step; tests/benchmark/test_serve_vllm.py has the same through a server."""

    def scene(engine: RealEngine) -> None:
        engine.add("stream", "tell me", max_tokens=40)
        engine.step()
        engine.add("long", prompt(0, 10 * BUDGET), max_tokens=10)

    _, ours = pair.compare(scene)
    stream = [delta for delta in ours.deltas if delta.name == "stream"]
    assert [len(delta.tokens) for delta in stream] == [1] * 40
    assert [delta.step for delta in stream] == list(range(1, 41))
    first_of_long = next(delta.step for delta in ours.deltas if delta.name == "long")
    assert first_of_long > 10
    tokenizer = pair.ours.engine.get_tokenizer()
    assert ours.texts["stream", 0] == tokenizer.decode(ours.of("stream"))


def test_a_budget_below_the_number_of_requests(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        for i in range(8):
            engine.add(f"r{i}", prompt(i, 1 + i), max_tokens=20)

    pair.ours.change(SarathiConfig(token_budget=3))
    try:
        _, ours = pair.compare(scene)
    finally:
        pair.ours.change(SarathiConfig(token_budget=BUDGET))
    assert ours.distinct == 8
    assert max(len(step.decodes_before) for step in ours.steps) == 3


def streams(engine: RealEngine) -> None:
    for i in range(3):
        engine.add(f"stream{i}", prompt(i, 20), max_tokens=30)
    engine.step(3)


def test_an_abort_in_the_middle_of_a_prompt(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        streams(engine)
        before = engine.free_blocks
        engine.add("long", prompt(9, 400))
        engine.step(3)
        assert engine.run.chunks("long") == 1 + 3
        assert engine.free_blocks < before
        engine.abort("long")
        assert engine.free_blocks == before

    alone, ours = pair.stock.play(streams), pair.ours.play(scene)
    assert ours.tokens == alone.tokens
    assert ours.distinct == 3


def test_an_abort_in_the_middle_of_an_answer(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        streams(engine)
        engine.add("victim", prompt(9, LONG), max_tokens=200)
        engine.step(10)
        before = engine.free_blocks
        engine.abort("victim")
        assert engine.free_blocks > before

    alone, ours = pair.stock.play(streams), pair.ours.play(scene)
    begun = {key: tokens for key, tokens in ours.tokens.items() if key not in alone.tokens}
    assert {key: tokens for key, tokens in ours.tokens.items() if key in alone.tokens} == alone.tokens
    assert begun.keys() == {("victim", 0)}
    assert 1 < len(begun["victim", 0]) < 10


def test_an_abort_of_everything_leaves_an_engine_that_answers(pair: Pair) -> None:
    def scene(engine: RealEngine) -> None:
        names = [f"r{i}" for i in range(20)]  # more than the 16 that run at once: some wait
        for i, name in enumerate(names):
            engine.add(name, prompt(i, 60))
        engine.step(6)
        assert engine.scheduler.running
        assert engine.scheduler.waiting
        for name in names:
            engine.abort(name)
        assert not engine.engine.has_unfinished_requests()
        engine.run = Run()
        engine.add("after", prompt(30, LONG))

    _, ours = pair.compare(scene)
    assert ours.chunks("after") == 4


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob", "Carol"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_structured_output(pair: Pair) -> None:
    def structured(engine: RealEngine, name: str, words: str, **kind: Any) -> None:
        params = StructuredOutputsParams(**kind)
        engine.add(name, words, max_tokens=60, structured_outputs=params, ignore_eos=False)

    def scene(engine: RealEngine) -> None:
        structured(engine, "json", "describe somebody " * 6, json=PERSON)
        structured(engine, "other json", "who?", json=PERSON)
        engine.step()
        structured(engine, "regex", "a number, please " * 3, regex="[a-f]{3}-[0-9]{4}")
        structured(engine, "choice", "choose one of three " * 10, choice=["stall", "hybrid", "chunk"])
        engine.add("free", prompt(4, 70))

    _, ours = pair.compare(scene)
    for name in ("json", "other json"):
        person = json.loads(ours.texts[name, 0])
        assert person.keys() == {"name", "age"}
        assert person["name"] in PERSON["properties"]["name"]["enum"]
        assert 0 <= person["age"] <= 99
    assert re.fullmatch("[a-f]{3}-[0-9]{4}", ours.texts["regex", 0])
    assert ours.texts["choice", 0] in ("stall", "hybrid", "chunk")
    assert ours.distinct == 5
    assert ours.chunks("choice") > 200 // BUDGET
