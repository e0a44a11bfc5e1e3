"""The middleware alone: what it puts into a body, and how a refusal takes the place of an answer."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GenerationError
from vllm.utils.async_utils import merge_async_iterators

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.gate import Refusal
from vllm_sarathi.engine import http
from vllm_sarathi.engine.admission import stop_reason
from vllm_sarathi.engine.http import ClassMiddleware

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"access-control-allow-origin", b"*")],
}
WHY = stop_reason(Refusal("chat", 3.2, 0.5))


def refusal() -> Exception:
    """Return what the stream of a refused request ends with."""
    error = http.refusal_error(SimpleNamespace(stop_reason=WHY))
    assert error is not None
    return error


class Call:
    """One HTTP request through the middleware, to an app that reads the body and sends what it is given.

    Where the engine fails, it sends that all the same, as vLLM sends an error."""

    def __init__(
        self, sends: list[dict[str, Any]], refuses: bool = False, path: str = "/v1/completions"
    ) -> None:
        self.sends, self.refuses, self.path = sends, refuses, path
        self.seen: bytes | None = None
        self.sent: list[dict[str, Any]] = []
        self.reads = 0

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen = (await receive())["body"]

        async def generate() -> Any:
            if self.refuses:
                try:
                    raise refusal()
                except Exception as error:
                    raise RuntimeError("as AsyncLLM.generate does") from error
            yield None

        try:
            async for _ in http._noting(generate)():
                break
        except type(refusal()):
            pass
        for message in self.sends:
            await send(message)

    def run(self, body: Any = b"{}", headers: dict[str, str] | None = None) -> "Call":
        parts = [body[:3], body[3:]] if isinstance(body, bytes) else [json.dumps(body).encode()]
        told = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
            for i, part in enumerate(parts)
        ]

        async def receive() -> Any:
            self.reads += 1
            return told.pop(0) if told else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        named = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": self.path, "headers": named}
        asyncio.run(ClassMiddleware(self._app)(scope, receive, send))
        return self


BODY = {"type": "http.response.body", "body": b"data: x", "more_body": True}
END = {"type": "http.response.body", "body": b""}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"chat": {}, "night": {"batch": True}}
    config = SarathiConfig.from_mapping({"slo_classes": {"classes": classes}, "fairness_header": "X-Tenant"})
    monkeypatch.setenv(http.SETTINGS_VARIABLE, "")
    added: list[str] = []
    for _ in range(2):
        http.serve_classes(config, added)
    assert added == [http.MIDDLEWARE]
    monkeypatch.setattr(http, "note_refusals", lambda: None)


@pytest.mark.parametrize(
    ("body", "headers", "xargs"),
    [
        ({}, {"x-slo-class": "chat"}, {"slo_class": "chat"}),
        ({}, {"x-llm-d-slo-ttft-ms": "750"}, {"ttft_slo_ms": 750.0}),
        ({}, {"X-Tenant": "me"}, {"slo_tenant": "me"}),
        ({"vllm_xargs": {"slo_tenant": "you", "a": 1}}, {}, {"a": 1}),
        ({"vllm_xargs": {"slo_tenant": "you"}}, {"x-tenant": "me"}, {"slo_tenant": "me"}),
        ({"vllm_xargs": {"slo_tenant": "you"}}, {}, None),
        ({"service_tier": "night"}, {}, {"slo_class": "night"}),
        ({"service_tier": "flex"}, {}, {"slo_class": "flex"}),
        ({"service_tier": "auto"}, {}, None),
        ({"service_tier": "flex"}, {"x-slo-class": "chat"}, {"slo_class": "chat"}),
        ({"service_tier": "flex"}, {"x-slo-class": " "}, {"slo_class": "flex"}),
        ({"service_tier": "flex", "vllm_xargs": {"slo_class": None}}, {}, {"slo_class": "flex"}),
        ({"service_tier": "flex", "vllm_xargs": {"slo_class": "chat"}}, {}, {"slo_class": "chat"}),
    ],
    ids=str,
)
def test_what_is_asked_for_reaches_the_body(body: Any, headers: dict[str, str], xargs: Any) -> None:
    call = Call([START, BODY, END]).run({"prompt": "a", **body}, headers)
    assert call.seen is not None
    seen = json.loads(call.seen)
    assert seen.get("vllm_xargs") == xargs
    assert seen["prompt"] == "a"
    assert seen.get("service_tier") == (
        None if body.get("service_tier") == "night" else body.get("service_tier")
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "vllm_xargs": {"slo_\\u0074enant": "you"}}',
        b'{"prompt": "a", "vllm\\u005fxargs": {"slo\\u005ftenant": "you"}}',
        '{"prompt": "a", "vllm_xargs": {"slo_tenant": "you"}}'.encode("utf-16"),
        '{"prompt": "a", "vllm_xargs": {"slo_tenant": "you"}}'.encode("utf-32-le"),
    ],
    ids=range(4),
)
def test_no_spelling_of_a_body_sets_a_tenant(body: bytes) -> None:
    seen = Call([START, BODY, END]).run(body, {}).seen
    assert seen is not None
    assert json.loads(seen) == {"prompt": "a", "vllm_xargs": None}


@pytest.mark.parametrize(
    ("extra_args", "headers", "seen"),
    [
        (None, {"x-slo-class": "chat"}, {"slo_class": "chat"}),
        ({"slo_tenant": "you", "a": 1}, {}, {"a": 1}),
        ({"slo_tenant": "you"}, {"x-tenant": "me"}, {"slo_tenant": "me"}),
    ],
    ids=str,
)
def test_what_is_asked_for_reaches_a_body_of_tokens(
    extra_args: Any, headers: dict[str, str], seen: Any
) -> None:
    """vLLM has `vllm_xargs` in no such body: what reaches the engine core are its sampling parameters."""
    body = {"token_ids": [1], "sampling_params": {"max_tokens": 3, "extra_args": extra_args}}
    call = Call([START, END], path="/inference/v1/generate").run(body, headers)
    assert call.seen is not None
    assert json.loads(call.seen) == {
        "token_ids": [1],
        "sampling_params": {"max_tokens": 3, "extra_args": seen},
    }


@pytest.mark.parametrize("body", [{"token_ids": [1]}, {"sampling_params": 3}, {"sampling_params": None}])
def test_a_body_of_tokens_without_sampling_parameters_stays_as_it_is(body: Any) -> None:
    call = Call([START, END], path="/inference/v1/generate").run(body, {"x-tenant": "me"})
    assert json.loads(call.seen or b"") == body


def test_an_slo_in_a_body_of_tokens_that_is_none_is_named_by_its_key() -> None:
    body = {"token_ids": [1], "sampling_params": {"extra_args": {"ttft_slo_ms": -1}}}
    sent = Call([START, END], path="/inference/v1/generate").run(body).sent
    assert sent[0]["status"] == 400
    assert b"sampling_params.extra_args.ttft_slo_ms -1: must be" in sent[1]["body"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_tenant_that_comes_in_by_another_door_is_forgotten(inside: bool) -> None:
    """A form of audio has `vllm_xargs`, too, and is not read here."""
    params = SimpleNamespace(extra_args={"slo_tenant": "me", "slo_class": "chat"})

    async def generate(*args: Any) -> Any:
        yield None

    async def ask() -> None:
        if inside:
            http._refusal.set(http._Refused("/v1/completions"))
        async for _ in http._noting(generate)("a prompt", params):
            pass

    asyncio.run(ask())
    assert ("slo_tenant" in params.extra_args) is inside
    assert params.extra_args["slo_class"] == "chat"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a"}',
        b'{"service_tier": ',
        b'["service_tier"]',
        b'{"service_tier": "flex", "vllm_xargs": 3}',
        b'{"service_tier": ' + b"[" * 100_000,
        b"\xff\xfe service_tier",
        b"",
    ],
    ids=range(7),
)
def test_what_asks_for_nothing_or_is_malformed_stays_as_it_is(body: bytes) -> None:
    headers = {} if b"prompt" in body else {"x-tenant": "me"}
    assert Call([START, END]).run(body, headers).seen == body


def test_an_answer_goes_out_as_it_came_once_there_is_something_to_send() -> None:
    assert Call([START, BODY, BODY, END]).run().sent == [START, BODY, BODY, END]
    assert Call([START]).run().sent == [START, {"type": "http.response.body", "body": b""}]
    other = Call([START, BODY, END], refuses=True, path="/v1/models").run()
    assert other.sent == [START, BODY, END]


@pytest.mark.parametrize("first", [[], [{**BODY, "body": b""}]], ids=["at once", "after an empty piece"])
def test_a_refusal_takes_the_place_of_the_whole_answer(first: list[Any]) -> None:
    call = Call([START, *first, BODY, BODY, END], refuses=True).run()
    start, body = call.sent
    assert start["status"] == 429
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"3"
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"access-control-allow-origin"] == b"*"
    assert int(headers[b"content-length"]) == len(body["body"])
    error = json.loads(body["body"])["error"]
    assert (error["predicted_ttft_ms"], error["ttft_slo_ms"], error["code"]) == (3200, 500, 429)
    assert "3200 ms" in error["message"]


def test_a_refusal_is_told_where_vllm_fails_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call([], refuses=True)
    app = call._app

    async def failing(*args: Any) -> None:
        await app(*args)
        raise IndexError

    monkeypatch.setattr(call, "_app", failing)
    assert call.run().sent[0]["status"] == 429
    call.refuses, call.sent = False, []
    with pytest.raises(IndexError):
        call.run()


def test_a_stream_of_responses_begins_with_what_the_engine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    created = {**BODY, "body": b"event: response.created"}
    for refuses, status in ((False, 200), (True, 429)):
        call = Call([BODY, END], refuses, "/v1/responses")
        app = call._app

        async def telling(scope: Any, receive: Any, send: Any, app: Any = app) -> None:
            for message in (START, created):
                await send(message)
            await app(scope, receive, send)

        monkeypatch.setattr(call, "_app", telling)
        call.run()
        assert call.sent[0]["status"] == status
        assert refuses or call.sent == [START, created, BODY, END]


def test_a_response_in_the_background_that_is_refused_is_stored_as_failed() -> None:
    """vLLM does so where its generator is cancelled."""
    call = Call([], refuses=True, path="/v1/responses")
    seen: list[BaseException] = []
    app = call._app

    async def answering_first(scope: Any, receive: Any, send: Any) -> None:
        for message in (START, {**END, "body": b"{}"}):
            await send(message)
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError as error:
            seen.append(error)

    call._app = answering_first  # type: ignore[method-assign]
    assert call.run().sent[0]["status"] == 200
    assert "cannot be met" in str(seen)


def test_nothing_is_read_before_the_server_reads_it() -> None:
    call = Call([])

    async def turned_away(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 401})
        await send(END)

    call._app = turned_away  # type: ignore[method-assign]
    call.run(b"x" * 100)
    assert call.reads == 0
    assert [message.get("status") for message in call.sent] == [401, None]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_where_vllm_serves_errors_badly_a_refused_request_ends_with_an_empty_answer(path: str) -> None:
    """Of an error it makes no event, and the client of a stream in the background would wait for ever."""
    told: list[Any] = []

    async def generate() -> Any:
        raise refusal()
        yield

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async for output in http._noting(generate)():
            told.append(output)
        for message in (START, BODY, END):
            await send(message)

    call = Call([], path=path)
    call._app = app  # type: ignore[method-assign]
    assert call.run().sent[0]["status"] == 429
    (output,) = told
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert not output.outputs[0].token_ids


MANY = 100_000
"""Outputs that take far longer than until the refusal, on any machine."""


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_list_the_first_refusal_ends_all(stream: bool) -> None:
    """At once, and nothing is left running; where the answer has begun, the stream says so."""
    closed, told = [], []

    async def generate(name: str) -> Any:
        try:
            for _ in range(MANY):
                if name == "late":
                    await asyncio.sleep(0.01 if stream else 0)
                    raise refusal()
                yield name
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        prompts = [http._noting(generate)(name) for name in ("a", "b", "late")]
        await send(START)
        try:
            async for _, output in merge_async_iterators(*prompts):
                told.append(output)
                if stream:
                    await send(BODY)
        except GenerationError as error:
            await send({**BODY, "body": f"data: {error}".encode()})
        await send(END)

    call = Call([])
    call._app = app  # type: ignore[method-assign]
    call.run()
    assert sorted(closed) == ["a", "b", "late"]
    assert len(told) < MANY
    assert call.sent[0]["status"] == (200 if stream else 429)
    assert b"cannot be met now" in b"".join(message.get("body", b"") for message in call.sent)


def test_a_stream_that_is_closed_early_closes_what_it_wraps() -> None:
    closed = []

    async def generate() -> Any:
        try:
            while True:
                yield SimpleNamespace(finished=False, outputs=[])
        finally:
            closed.append(True)

    async def read_one() -> None:
        outputs = http._noting(generate)()
        await anext(outputs)
        await outputs.aclose()  # type: ignore[attr-defined]
        assert closed == [True]  # now, and not when somebody collects the garbage

    asyncio.run(read_one())


@pytest.mark.parametrize(
    ("body", "headers", "sentence"),
    [
        ({"vllm_xargs": {"ttft_slo_ms": 5e-324}}, {}, "vllm_xargs.ttft_slo_ms 5e-324: must be a number of"),
        ({"vllm_xargs": {"tbt_slo_ms": "soon"}}, {}, "vllm_xargs.tbt_slo_ms 'soon': must be a number of"),
        ({"vllm_xargs": {"slo_class": "\ud800"}}, {}, "slo_class '\\ud800': must be text that"),
        ({"service_tier": "\ud800"}, {}, "slo_class '\\ud800': must be text that"),
        ({"vllm_xargs": {"tbt_slo_ms": math.inf}}, {}, "vllm_xargs.tbt_slo_ms inf: must be a number of"),
        ({}, {"x-llm-d-slo-ttft-ms": "soon"}, "x-llm-d-slo-ttft-ms 'soon': must be a number of milliseconds"),
        (
            {},
            {"x-llm-d-slo-ttft-ms": "nan"},
            "x-llm-d-slo-ttft-ms nan: must be a number of milliseconds from 0.1",
        ),
        ({}, {"x-llm-d-slo-ttft-ms": "x" * 300}, "xxx...: must be a number of milliseconds"),
        ({}, {"x-tenant": "t" * 257}, "ttt...: must have at most 256 characters."),
    ],
    ids=str,
)
def test_what_is_no_slo_is_answered_by_a_sentence(body: Any, headers: dict[str, str], sentence: str) -> None:
    call = Call([{**START, "status": 422}, BODY, END]).run({"prompt": "a", **body}, headers)
    assert call.seen == b""  # nothing that an engine could begin with
    start, sent = call.sent
    assert start["status"] == 400
    assert b"retry-after" not in dict(start["headers"])
    error = json.loads(sent["body"])["error"]
    assert sentence in error["message"]
    assert error["code"] == 400


def test_a_router_that_has_no_slo_says_0() -> None:
    call = Call([START, BODY, END]).run({"prompt": "a"}, {"x-llm-d-slo-ttft-ms": "0"})
    assert call.seen == b'{"prompt": "a"}'
    assert call.sent[0]["status"] == 200


def test_without_classes_bodies_alone_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[str] = []
    http.serve_classes(SarathiConfig(), added)
    assert not added
    http.serve_classes(SarathiConfig(allow_request_slo=True), added)
    assert added == [http.MIDDLEWARE]
    headers = {"x-slo-class": "chat", "x-llm-d-slo-ttft-ms": "5", "x-tenant": "me"}
    asked = {"prompt": "a", "service_tier": "flex", "vllm_xargs": {"tbt_slo_ms": 30}}
    seen = Call([START, BODY, END]).run(asked, headers).seen
    assert seen is not None
    assert json.loads(seen) == asked
    wrong = Call([START, BODY, END]).run({"vllm_xargs": {"tbt_slo_ms": -3}}, headers)
    assert wrong.sent[0]["status"] == 400
