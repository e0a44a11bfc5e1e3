"""Live control: what is changed while requests run loses none of them, and what is wrong changes nothing."""

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.asgi import FakeCore, Server
from vllm_sarathi import SarathiConfig
from vllm_sarathi.benchmark.profile.trace import read_step_trace
from vllm_sarathi.core.config import SCHEDULERS
from vllm_sarathi.engine.control import AT_START_ONLY, Control
from vllm_sarathi.engine.vllm import utility
from vllm_sarathi.testing.modelled import ModelledEngine


@pytest.fixture
def engine(make_config: Any) -> ModelledEngine:
    return ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100)))


@pytest.fixture
def server(engine: ModelledEngine) -> Server:
    return Server(FakeCore(engine.scheduler))


def change(server: Server, **settings: Any) -> tuple[int, Any]:
    return server.ask("PATCH", "", json.dumps(settings).encode())


def expected(engine: ModelledEngine, name: str, prompt: int, tokens: int) -> list[int]:
    return [engine.token(name, prompt + i) for i in range(tokens)]


def test_an_slo_is_changed_while_requests_run(
    engine: ModelledEngine, server: Server, warned: list[str]
) -> None:
    engine.add("a", 20, max_tokens=30)
    for _ in range(5):
        engine.step()
    model = engine.scheduler.controller.model
    status, said = change(server, tbt_slo_ms=150, prefill_max_wait_s=5)
    assert status == 200
    assert said["engines"][0]["changed"] == {
        "tbt_slo_ms": {"old": 100, "new": 150},
        "prefill_max_wait_s": {"old": 30.0, "new": 5},
    }
    assert warned == [
        "Changed while serving: --tbt-slo-ms is 150 now, and was 100.",
        "Changed while serving: --prefill-max-wait-s is 5 now, and was 30.0.",
    ]
    assert engine.scheduler.controller.model is model
    assert engine.scheduler.controller.tbt_slo_s == 0.15
    status, said = server.ask("GET", "")
    assert said["engines"][0]["settings"]["tbt_slo_ms"] == 150
    assert said["engines"][0]["running"] == 1
    engine.drain()
    assert engine.outputs["a"] == expected(engine, "a", 20, 30)
    assert engine.scheduler.faults.total == 0


@pytest.mark.parametrize(("mode", "stages"), [("sync", 1), ("pipeline", 2)])
def test_gaps_are_judged_by_the_slo_of_the_moment_though_nobody_comes_or_goes(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, mode: str, stages: int
) -> None:
    classes = {
        "classes": {"own": {"tbt_slo_ms": 400}, "servers": {"ttft_slo_ms": 900}, "night": {"batch": True}}
    }
    config = SarathiConfig.from_mapping({"tbt_slo_ms": 100, "slo_classes": classes})
    engine = ModelledEngine(make_config(config, mode), in_flight=stages, log_stats=True)
    noted: list[dict[str, tuple[int, float | None]]] = []

    def note(record: Any, running: int, waiting: int, gaps: Any, first_tokens: Any, *others: Any) -> None:
        noted.append({each.slo_class: (each.decodes, each.slo_s) for each in gaps})

    monkeypatch.setattr(engine.scheduler.telemetry, "note", note)
    for i, name in enumerate(["own", "servers", "servers", "night"] * stages):
        engine.add(f"{name}-{i}", 20, max_tokens=60, sampling={"extra_args": {"slo_class": name}})
    for _ in range(8 * stages):
        engine.step()
    server = Server(FakeCore(engine.scheduler))
    for slo_ms in (100, 250, 50):
        assert change(server, tbt_slo_ms=slo_ms)[0] == 200
        for _ in range(2 * stages):  # what was planned before comes out first
            engine.step()
        expected = {"own": 0.4 / stages, "servers": slo_ms / 1e3 / stages, "night": None}
        assert {name: slo_s for name, (_, slo_s) in noted[-1].items()} == expected
        assert sum(count for count, _ in noted[-1].values()) == 4 * stages
    engine.drain()
    engine.scheduler.shutdown()


@pytest.mark.parametrize("mode", ["sync", "async", "pipeline"])
def test_no_request_is_lost_whatever_is_changed_when(make_config: Any, mode: str) -> None:
    chance = random.Random(f"changes {mode}")
    engine = ModelledEngine(
        make_config(SarathiConfig(tbt_slo_ms=100), mode), in_flight=1 if mode == "sync" else 2
    )
    server = Server(FakeCore(engine.scheduler))
    ends: dict[str, tuple[int, int]] = {}
    for i in range(400):
        if chance.random() < 0.2:
            ends[str(i)] = chance.randrange(1, 150), chance.randrange(1, 20)
            engine.add(str(i), ends[str(i)][0], max_tokens=ends[str(i)][1])
        if chance.random() < 0.3:
            status, said = change(server, **chance.choice(CHANGES))
            assert status == 200, said
        engine.step()
    engine.drain()
    assert set(engine.finished) == set(ends)
    for name, (prompt, tokens) in ends.items():
        assert engine.outputs[name] == expected(engine, name, prompt, tokens)
    assert engine.scheduler.faults.total == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 63


FRESH: dict[str, Any] = dict.fromkeys(sorted({*SarathiConfig.keys()} - set(AT_START_ONLY)))
CHANGES: list[dict[str, Any]] = [
    {**FRESH, **settings}  # type: ignore[dict-item]  # their values are of several types
    for settings in (
        {"tbt_slo_ms": 20},
        {"tbt_slo_ms": 200, "tbt_mode": "pace"},
        {"tbt_slo": "auto:25x"},
        {"token_budget": 40},
        {"prefill_order": "sjf"},
        {"prefill_order": "deadline", "ttft_slo_ms": 500},
        {"prefill_order": "deadline", "allow_request_slo": True},
        *({"scheduler": name} for name in SCHEDULERS),
    )
]


@pytest.mark.parametrize("other", [{"scheduler": "orca"}, {"token_budget": 64}])
def test_a_calibration_folder_of_the_start_keeps_nobody_from_a_policy_that_learns_nothing(
    make_config: Any, tmp_path: Path, other: dict[str, Any]
) -> None:
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100)))
    scheduler = engine.scheduler  # this one remembers nothing; as if a server had been started with a folder
    scheduler.config = SarathiConfig(tbt_slo_ms=100, calibration_dir=str(tmp_path))
    scheduler.control = Control(scheduler)
    server = Server(FakeCore(scheduler))
    for settings, folder in (
        ({**other, "tbt_slo_ms": None}, "none"),
        ({"scheduler": "sarathi", "token_budget": None, "tbt_slo_ms": 50}, str(tmp_path)),
    ):
        status, said = change(server, **settings)
        assert status == 200, said
        assert said["engines"][0]["settings"]["calibration_dir"] == folder


def test_those_who_wait_go_by_the_new_order(engine: ModelledEngine, server: Server) -> None:
    engine.add("long", 250, max_tokens=2, arrival_s=1.0)
    for i, tokens in enumerate((200, 150, 20)):
        engine.add(f"waits {tokens}", tokens, max_tokens=2, arrival_s=2.0 + i)
    engine.scheduler.wall_clock = lambda: 3.0
    assert change(server, prefill_order="sjf", token_budget=64, tbt_slo_ms=None)[0] == 200
    order = []
    while not engine.idle():
        engine.step()
        order += [name for name in engine.finished if name not in order]
    assert order == ["waits 20", "waits 150", "waits 200", "long"]
    assert engine.scheduler.faults.total == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tbt_slo_ms": -1}, "--tbt-slo-ms -1: must be a number of milliseconds from 0.1 to 3,600,000."),
        ({"tbt_slo_ms": 10**400}, "00000...: must be a number of milliseconds"),
        ({"tbt_slo_ms": 5e-324}, "--tbt-slo-ms 5e-324: must be a number of milliseconds from 0.1"),
        ({"prefill_max_wait_s": 1e-9}, "--prefill-max-wait-s 1e-09: must be a number of at least 0.001"),
        ({"x" * 3000: 1}, "xxx...; valid: "),
        ({"tbt_slo_ms": "fast"}, "--tbt-slo-ms 'fast': must be a number"),
        ({"tbt_slo_msec": 5}, "PATCH: unknown key 'tbt_slo_msec'; did you mean 'tbt_slo_ms'?"),
        ({"token_budget": 32}, "--token-budget 32: a fixed budget cannot keep --tbt-slo-ms 100"),
        ({"token_budget": 10**6, "tbt_slo_ms": None}, "above the engine's limit of 256 tokens"),
        ({"ttft_slo_ms": 500}, "has no effect without --prefill-order deadline"),
        ({"scheduler": "orcas"}, "--scheduler 'orcas': unknown scheduler; did you mean 'orca'?"),
        ({"scheduler": "default"}, "--scheduler default: is vLLM's own scheduler"),
        ({"step_trace": "/etc/passwd"}, "--step-trace: can only be given when the server starts."),
        ({"calibration_dir": "/tmp"}, "--calibration-dir: can only be given when the server starts."),
        ({"prefill_max_wait_s": 1, "min_request_slo_ms": 5}, "without --allow-request-slo"),
    ],
)
def test_what_is_wrong_is_refused_by_a_sentence_and_changes_nothing(
    engine: ModelledEngine, server: Server, settings: dict[str, Any], sentence: str
) -> None:
    before = engine.scheduler.config
    status, said = change(server, **settings)
    assert status == 400
    assert sentence in said["error"]
    assert engine.scheduler.config is before
    assert engine.scheduler.controller.config is before
    assert engine.scheduler.faults.total == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is not valid JSON"),
        (b"[1]", "the body must be a JSON object of settings, not list."),
        (b"{}", "the body names no setting"),
        (b'{"tbt_slo_ms": 100, "tbt_slo_ms": 200}', "the body: key 'tbt_slo_ms': is given twice."),
        (b'{"tbt_slo_ms": NaN}', "NaN is not a JSON number"),
        (b"[" * 16_000, "the body is not valid JSON"),
        (b'{"tbt_slo_ms": ' + b"9" * 5000 + b"}", "the body is not valid JSON"),
        (b"\xff\xfe", "the body is not valid JSON"),
        (b'{"\\ud800": 1}', "unknown key '\\ud800'"),
        (b" " * 16_385, "the body is longer than 16384 bytes."),
    ],
)
def test_what_is_no_object_of_settings_is_refused(server: Server, body: bytes, sentence: str) -> None:
    status, said = server.ask("PATCH", "", body)
    assert status == 400
    assert sentence in said["error"]


def test_the_step_trace_starts_and_stops(
    engine: ModelledEngine, server: Server, warned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine.add("a", 20, max_tokens=60)
    engine.step()
    status, said = server.ask("POST", "/step_trace/start")
    path = Path(said["engines"][0]["step_trace"])
    assert status == 200
    assert path.is_relative_to(tmp_path)
    assert server.ask("POST", "/step_trace/start")[1] == said  # again: nothing more
    for _ in range(10):
        engine.step()
    engine.scheduler.telemetry.flush()
    assert len(read_step_trace(path)) == 10
    status, said = server.ask("POST", "/step_trace/stop")
    assert said["engines"][0] == {"step_trace": None, "last_step_trace": str(path)}
    engine.step()
    engine.scheduler.telemetry.flush()
    assert len(read_step_trace(path)) == 10
    assert len(warned) == 2
    server.ask("POST", "/step_trace/start")
    engine.step()
    engine.scheduler.shutdown()
    assert len(read_step_trace(path)) == 11


def test_a_trace_that_cannot_be_written_is_refused(
    make_config: Any, tmp_path: Path, warned: list[str]
) -> None:
    (tmp_path / "t").mkdir()
    engine = ModelledEngine(make_config(SarathiConfig(step_trace=str(tmp_path / "t" / "x.jsonl"))))
    server = Server(FakeCore(engine.scheduler))
    assert server.ask("POST", "/step_trace/stop")[0] == 200
    (tmp_path / "t").rmdir()
    status, said = server.ask("POST", "/step_trace/start")
    assert status == 400
    assert "cannot be written (No such file or directory)" in said["error"]
    assert server.ask("GET", "")[1]["engines"][0]["step_trace"] is None
    engine.scheduler.shutdown()


def test_when_the_first_token_would_come(engine: ModelledEngine, server: Server) -> None:
    assert server.ask("GET", "/when_first_token", query="tokens=100")[1]["engines"][0]["wait_s"] is None
    engine.scheduler.clock = iter(x / 100 for x in range(10**6)).__next__
    engine.add("decodes", 20, max_tokens=200)
    for _ in range(60):
        engine.step()

    def wait_s(query: str) -> dict[str, Any]:
        status, said = server.ask("GET", "/when_first_token", query=query)
        assert status == 200, said
        return said["engines"][0]

    short, long = wait_s("tokens=10&ttft_slo_ms=3600000"), wait_s("tokens=1000&ttft_slo_ms=0.1")
    assert 0 < short["wait_s"] < long["wait_s"]
    assert short["kept"] is True
    assert long["kept"] is False
    for i in range(30):
        engine.add(f"waits {i}", 100)
    behind = wait_s("tokens=10")
    assert behind["ahead_tokens"] == 3000
    assert behind["wait_s"] > long["wait_s"]
    change(server, prefill_order="sjf")
    assert wait_s("tokens=10")["ahead_tokens"] == 0
    assert wait_s("tokens=100")["ahead_tokens"] == 3000


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("", "the parameter tokens is missing"),
        ("tokens=many", "tokens 'many': must be a whole number above 0"),
        ("tokens=0", "tokens '0': must be a whole number above 0"),
        ("tokens=1e3", "must be a whole number"),
        ("tokens=3_0", "tokens '3_0': must be a whole number"),
        ("tokens=%D9%A3", "must be a whole number"),
        ("tokens=5&ttft_slo_ms=nan", "ttft_slo_ms nan: must be a number of milliseconds"),
        ("tokens=5&slo=3", "unknown parameter 'slo'; valid: tokens, ttft_slo_ms, slo_class."),
        (
            "tokens=" + "9" * 5000,
            "99999...: must be a whole number",
        ),
        ("tokens=5&ttft_slo_ms=soon", "ttft_slo_ms 'soon': must be a number."),
        ("tokens=5&" + "x" * 3000 + "=1", "xxx...; valid: tokens"),
        ("tokens=5&slo_class=chat", "slo_class 'chat': this server has no classes (--slo-classes)."),
    ],
)
def test_a_question_that_is_none_is_refused(server: Server, query: str, sentence: str) -> None:
    status, said = server.ask("GET", "/when_first_token", query=query)
    assert status == 400
    assert sentence in said["error"]


def test_a_server_with_another_scheduler_says_so_and_is_asked_once() -> None:
    asked = []

    async def stock(method: str, *args: Any) -> list[Any]:
        asked.append(method)
        text = f"'EngineCoreProc' object has no attribute '{method}'"
        raise RuntimeError(f"Call to {method} method failed: {text}")

    server = Server(SimpleNamespace(call_utility_all_async=stock))
    for _ in range(2):
        status, said = change(server, tbt_slo_ms=5)
        assert status == 409
        assert "does not run a scheduler of vllm-sarathi" in said["error"]
    assert len(asked) == 1


def test_an_engine_that_is_gone_is_said(warned: list[str]) -> None:
    async def dead(method: str, *args: Any) -> list[Any]:
        raise RuntimeError("EngineDead")

    server = Server(SimpleNamespace(call_utility_all_async=dead))
    assert change(server, tbt_slo_ms=5)[0] == 503
    assert "EngineDead" in warned[0]


def test_every_engine_is_told_and_older_clients_tell_the_first_ones_answer(make_config: Any) -> None:
    engines = [ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100))) for _ in range(2)]
    server = Server(FakeCore(*(e.scheduler for e in engines)))
    assert len(change(server, tbt_slo_ms=70)[1]["engines"]) == 2
    assert [e.scheduler.config.tbt_slo_ms for e in engines] == [70, 70]

    async def first(method: str, *args: Any) -> Any:
        answers = [e.scheduler.control.answer(*args) for e in engines]
        return answers[0]

    server = Server(SimpleNamespace(call_utility_async=first))
    assert len(change(server, tbt_slo_ms=80)[1]["engines"]) == 1
    assert [e.scheduler.config.tbt_slo_ms for e in engines] == [80, 80]


def test_the_engine_core_of_vllm_hands_commands_on(engine: ModelledEngine) -> None:
    from vllm.v1.engine.core import EngineCore

    utility.offer_control()
    core = EngineCore.__new__(EngineCore)
    core.scheduler = engine.scheduler
    answer = json.loads(getattr(core, utility.METHOD)(json.dumps({"command": "state"})))
    assert answer["status"] == 200
    assert answer["settings"]["tbt_slo_ms"] == 100


def test_an_error_of_ours_is_counted_and_ends_nothing(
    engine: ModelledEngine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.scheduler.controller, "reconfigure", lambda config: 1 / 0)
    assert change(server, tbt_slo_ms=5)[0] == 500
    assert engine.scheduler.faults.total == 1
    engine.add("a", 20, max_tokens=3)
    engine.drain()
    assert engine.outputs["a"] == expected(engine, "a", 20, 3)


# Whatever is sent.

SCRAPS: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**63,
    10**400,
    1e308,
    -0.0,
    5e-324,
    150,
    "",
    "auto",
    "auto:0x",
    "sarathi",
    "fcfs",
    "deadline",
    "\x00",
    "\ud800",
    "x" * 3000,
    "../../etc/passwd",
    [],
    [1, [2]],
    {},
    {"a": {"b": None}},
]


def malformed(chance: random.Random) -> bytes:
    """Return a body: settings with odd values, JSON with bytes that do not belong, or bytes."""
    keys = [*SarathiConfig.keys(), "", "nonsense", "\ud800", "settings", "command", "on", "__class__"]
    if (kind := chance.random()) < 0.1:
        return chance.randbytes(chance.randrange(200))
    if kind < 0.2:
        return json.dumps(chance.choice(SCRAPS)).encode()
    body = {chance.choice(keys): chance.choice(SCRAPS) for _ in range(chance.randrange(1, 5))}
    text = bytearray(json.dumps(body).encode())
    if kind < 0.5:
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(text))
            text[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            text = text or bytearray(b"x")
    return bytes(text)


def test_ten_thousand_malformed_bodies_end_nothing(engine: ModelledEngine, server: Server) -> None:
    chance, seen = random.Random(17), set()

    async def send_all() -> None:
        for i in range(10_000):
            method, path = chance.choice((("PATCH", ""), ("PATCH", ""), ("POST", "/step_trace/stop")))
            query = chance.randbytes(12) if i % 5 == 0 else b""
            if i % 5 == 0:
                method, path, query = "GET", "/when_first_token", b"tokens=" + query.hex().encode()
            status, said = await server.ask_async(method, path, malformed(chance), query)
            assert status < 500, said
            assert status == 200 or said["error"]
            seen.add(status)
            if i % 100 == 0:
                engine.add(str(i), 20, max_tokens=2)
            if i % 25 == 0:
                engine.step()

    asyncio.run(send_all())
    engine.drain()
    assert seen == {200, 400}
    assert len(engine.finished) == 100
    assert engine.scheduler.faults.total == 0
