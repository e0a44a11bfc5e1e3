"""SLO classes that are changed while requests run: who is bound by what, and what cannot be changed."""

import json
import random
from typing import Any

import pytest

from tests.engine.asgi import FakeCore, Server
from vllm_sarathi import SarathiConfig
from vllm_sarathi.testing.modelled import ModelledEngine

CLASSES = {
    "default": "chat",
    "classes": {
        "chat": {"ttft_slo_ms": 2000, "tbt_slo_ms": 100, "when_late": "relegate"},
        "work": {"ttft_slo_ms": 9000, "weight": 2},
        "night": {"batch": True},
    },
}


@pytest.fixture
def engine(make_config: Any) -> ModelledEngine:
    return ModelledEngine(make_config(SarathiConfig.from_mapping({"slo_classes": CLASSES})))


@pytest.fixture
def server(engine: ModelledEngine) -> Server:
    return Server(FakeCore(engine.scheduler))


def change(server: Server, classes: Any, **settings: Any) -> tuple[int, Any]:
    return server.ask("PATCH", "", json.dumps({"slo_classes": classes, **settings}).encode())


def add(engine: ModelledEngine, name: str, slo_class: str, prompt: int = 20, tokens: int = 8) -> Any:
    return engine.add(name, prompt, max_tokens=tokens, sampling={"extra_args": {"slo_class": slo_class}})


def test_those_that_come_later_are_bound_by_the_new_slo_and_those_that_are_there_by_the_old(
    engine: ModelledEngine, server: Server, warned: list[str]
) -> None:
    early = add(engine, "early", "chat")
    status, said = change(
        server, {"classes": {"chat": {"tbt_slo_ms": 40, "when_late": "refuse"}, "night": {"max_wait_s": 7}}}
    )
    assert status == 200
    wanted = {
        "chat": {"ttft_slo_ms": 2000, "tbt_slo_ms": 40, "when_late": "refuse"},
        "work": {"ttft_slo_ms": 9000, "weight": 2},
        "night": {"batch": True, "max_wait_s": 7},
    }
    assert said["engines"][0]["settings"]["slo_classes"]["classes"] == wanted
    assert said["engines"][0]["changed"]["slo_classes"]["old"] == CLASSES
    assert sorted(warned) == [
        "Changed while serving: --slo-classes classes.chat.tbt_slo_ms is 40 now, and was 100.",
        "Changed while serving: --slo-classes classes.chat.when_late is 'refuse' now, and was 'relegate'.",
        "Changed while serving: --slo-classes classes.night.max_wait_s is 7 now, and was 300.0.",
    ]
    late = add(engine, "late", "chat")
    bond = engine.scheduler.views.bond
    assert (bond(early).tbt_slo_s, bond(late).tbt_slo_s) == (0.1, 0.04)
    assert bond(late).slo_class.when_late == "refuse"
    assert engine.scheduler.controller.tbt_slo_s == 0.04
    engine.drain()
    assert {len(tokens) for tokens in engine.outputs.values()} == {8}
    assert engine.scheduler.faults.total == 0


def test_none_takes_an_slo_away(engine: ModelledEngine, server: Server) -> None:
    assert change(server, {"classes": {"chat": {"tbt_slo_ms": None}}})[0] == 200
    request = add(engine, "a", "chat")
    assert engine.scheduler.views.bond(request).tbt_slo_s is None


def test_the_order_goes_by_the_new_bounds(engine: ModelledEngine, server: Server) -> None:
    """A step is never so long that the most urgent class's first token would be late; that is of the new SLO."""
    controller = engine.scheduler.controller
    before_s = controller.order.longest_step_s(0.0, 0.1)
    assert change(server, {"classes": {"chat": {"ttft_slo_ms": 500}}}, prefill_max_wait_s=3)[0] == 200
    assert controller.order.longest_step_s(0.0, 0.1) == before_s / 4
    late = add(engine, "a", "chat")
    order, bond = controller.order, engine.scheduler.views.bond(late)
    assert [order.presses(bond, age_s, "a", False) for age_s in (2.9, 3.1)] == [False, True]


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ("/etc/passwd", "--slo-classes: can only be given when the server starts."),
        (None, "--slo-classes: can only be given when the server starts."),
        ({"chat": {"tbt_slo_ms": 40}}, "must be {'classes': {NAME: {...}}} with what is to change."),
        ({"classes": [1]}, "must be {'classes': {NAME: {...}}}"),
        ({"classes": {}, "default": "work"}, "must be {'classes': {NAME: {...}}}"),
        ({"classes": {"chatt": {}}}, "slo_classes: classes 'chatt': no such class; did you mean 'chat'?"),
        ({"classes": {"chat": 5}}, "classes.chat 5: must be a mapping of its SLOs."),
        (
            {"classes": {"chat": {"batch": True}}},
            "classes.chat.batch: can only be given when the server starts",
        ),
        (
            {"classes": {"chat": {"tbt_slo_ms": -1}}},
            "classes.chat.tbt_slo_ms -1: must be a number of milliseconds",
        ),
        ({"classes": {"chat": {"ttft_slo_ms": None}}}, "has no effect without ttft_slo_ms"),
        ({"classes": {"night": {"tbt_slo_ms": 5}}}, "batch work has no SLO"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_a_sentence_and_changes_nothing(
    engine: ModelledEngine, server: Server, classes: Any, sentence: str
) -> None:
    before = engine.scheduler.config
    status, said = change(server, classes)
    assert status == 400
    assert sentence in said["error"]
    assert engine.scheduler.config is before
    assert engine.scheduler.faults.total == 0


def test_without_classes_none_can_be_made(make_config: Any) -> None:
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100)))
    status, said = change(Server(FakeCore(engine.scheduler)), {"classes": {"chat": {"tbt_slo_ms": 5}}})
    assert status == 400
    assert said["error"] == "--slo-classes: can only be given when the server starts."


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
def test_no_request_is_lost_whatever_is_changed_when(make_config: Any, mode: str) -> None:
    chance = random.Random(f"classes {mode}")
    config = SarathiConfig.from_mapping({"slo_classes": CLASSES})
    engine = ModelledEngine(make_config(config, mode), in_flight=1 if mode == "sync" else 2)
    server = Server(FakeCore(engine.scheduler))
    ends: dict[str, int] = {}
    for i in range(300):
        if chance.random() < 0.2:
            ends[str(i)] = chance.randrange(1, 20)
            add(
                engine,
                str(i),
                chance.choice(["chat", "work", "night"]),
                chance.randrange(1, 150),
                ends[str(i)],
            )
        if chance.random() < 0.3:
            slos = {
                "tbt_slo_ms": chance.choice([5, 50, 500, None]),
                "ttft_slo_ms": chance.choice([50, 9000]),
                "when_late": chance.choice(["serve", "relegate"]),
                "weight": chance.choice([1, 3]),
            }
            night = {"max_wait_s": chance.choice([1, 300])}
            status, said = change(
                server, {"classes": {chance.choice(["chat", "work"]): slos, "night": night}}
            )
            assert status == 200, said
        engine.step()
    engine.drain()
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == ends
    assert engine.scheduler.faults.total == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63


def test_the_tier_that_asks_for_none_stands_for_the_default_class(engine: ModelledEngine) -> None:
    command = {"command": "first_token", "tokens": 20, "slo_class": "auto"}
    said = json.loads(engine.scheduler.control.answer(json.dumps(command)))
    assert (said["status"], said["slo_class"]) == (200, CLASSES["default"])
