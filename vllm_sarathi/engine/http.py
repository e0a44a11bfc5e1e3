"""Classes over HTTP: what headers and `service_tier` say reaches the engine core, and a refusal leaves as a 429.

`vllm serve --middleware` is the door: an ASGI middleware that is there only where requests may ask for SLOs. It puts
what routers send in headers into the body's `vllm_xargs`, which vLLM hands on to the engine core as `extra_args`; it
answers 400 to who asks for what is no SLO; and it holds back the first line of an answer until there is something to
send, as a stream would be 200 before anybody knows of its refusal.

A refused request ends with an error of vLLM's kind. So whatever else belongs to it ends, too (the other prompts of a
list, the others of `n`), at once and not when those have been answered; and vLLM's own figures count no answer. Where
an error would be badly served, and there are no lists, it ends with an empty answer, which is not sent."""

import asyncio
import contextlib
import functools
import json
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm_sarathi.core.classes import MOST_NAME_CHARACTERS, NO_TIER, slo_ms
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.errors import ConfigError, short
from vllm_sarathi.engine.admission import REFUSED, is_refusal, sentence
from vllm_sarathi.engine.request_slo import CLASS_KEY, TBT_KEY, TENANT_KEY, TTFT_KEY
from vllm_sarathi.engine.vllm.internals import async_engine_class, generation_error_class
from vllm_sarathi.engine.vllm.outputs import aborted_output, divert_outputs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MIDDLEWARE = "vllm_sarathi.engine.http.ClassMiddleware"
"""What `--middleware` takes."""

SETTINGS_VARIABLE = "SARATHI_HTTP_CLASSES"
"""What the middleware has to know; several API servers are processes that inherit no more than this."""

TOKENS, RESPONSES = "/inference/v1/generate", "/v1/responses"

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    RESPONSES,
    "/v1/messages",
    "/invocations",
    TOKENS,
)
"""Where prompts come in as JSON; what stands before them is the server's root path."""

XARGS = ("vllm_xargs",)
TOKENS_XARGS = ("sampling_params", "extra_args")
"""Where in a body the arguments are that reach the engine core; the second in one of tokens (`--enable-scale-out`)."""

FAIL_BADLY = (RESPONSES, "/v1/messages")
"""Where vLLM makes no answer of an error: it takes it for one of its events, and a stream waits for ever."""

CLASS_HEADER, TTFT_HEADER = b"x-slo-class", b"x-llm-d-slo-ttft-ms"
TIER = "service_tier"

TELLING = (
    *(word.encode() for word in (TIER, CLASS_KEY, TENANT_KEY, TBT_KEY, TTFT_KEY)),
    b"\\u",
    b"\0",
)
"""A body without any of these says nothing of tier, tenant or SLO, nor does it by escapes or in UTF-16 or UTF-32."""

_refusal: ContextVar["_Refused | None"] = ContextVar("vllm_sarathi_refusal", default=None)


class _Refused:
    """What became of one HTTP request.

    Args:
        path: where it came in.

    Attributes:
        xargs: where in its body the arguments are that reach the engine core.
        tells_first: whether its stream tells of the request itself before the engine has answered.
        fails_badly: whether an error of the engine makes no answer there.
        why: why it was refused.
        wrong: what is wrong with it.
        answered: whether the engine has said anything to it.
        stored: whether the answer has been sent, and the client asks for the rest of it later.
    """

    def __init__(self, path: str) -> None:
        self.xargs = TOKENS_XARGS if path.endswith(TOKENS) else XARGS
        self.tells_first = path.endswith(RESPONSES)
        self.fails_badly = path.endswith(FAIL_BADLY)
        self.why: dict[str, Any] | None = None
        self.wrong: str | None = None
        self.answered = False
        self.stored = False


class ClassMiddleware:
    """Moves what is asked for into a request's body, and answers refusals.

    Args:
        app: the server.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        settings = json.loads(os.environ[SETTINGS_VARIABLE])
        self._fairness_header: str | None = settings["fairness_header"]
        self._classes = frozenset(settings["classes"])
        note_refusals()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope.get("method") != "POST" or not path.endswith(PATHS):
            await self._app(scope, receive, send)
            return
        refused = _Refused(path)
        _refusal.set(refused)  # for this task, which serves nothing else
        holding = _Holding(send, refused)
        asking = _Asking(scope, receive, self._fairness_header, self._classes, refused)
        try:
            await self._app(scope, asking, holding)
        except Exception:
            if not await holding.refuse():
                raise
        await holding.end()


class _Asking:
    """Hands out a request's body with what its headers ask for in it; read when the server reads it, and not before.

    So whoever is turned away at the door (no API key) has nothing read. The header with the body's length stays as it
    was sent: nobody behind this point goes by it.
    """

    def __init__(
        self,
        scope: Message,
        receive: Receive,
        fairness_header: str | None,
        classes: frozenset[str],
        refused: _Refused,
    ) -> None:
        self._receive = receive
        self._headers = dict(scope["headers"])
        self._fairness_header = fairness_header
        self._classes = classes
        self._refused = refused
        self._read = False

    async def __call__(self) -> Message:
        if self._read:
            return await self._receive()
        self._read = True
        chunks, more = [], True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":  # the client is gone
                return message
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(chunks)
        try:
            wishes = {} if self._fairness_header is None else _wishes(self._headers, self._fairness_header)
            changed = _rewritten(body, wishes, self._classes, self._refused.xargs)
        except ConfigError as error:
            self._refused.wrong = str(error)
            changed = b""  # the server does nothing with it, and what it answers is not sent
        return {"type": "http.request", "body": body if changed is None else changed}


def _wishes(headers: dict[bytes, bytes], fairness_header: str) -> dict[str, Any]:
    """Return what headers ask for, by the keys of `vllm_xargs`.

    Raises:
        ConfigError: one says what it cannot.
    """
    wishes: dict[str, Any] = {}
    if name := headers.get(CLASS_HEADER, b"").decode("latin-1").strip():  # a proxy may send an empty one
        wishes[CLASS_KEY] = name
    if (text := headers.get(TTFT_HEADER)) is not None:
        said: float | str = text.decode("latin-1")
        with contextlib.suppress(ValueError):
            said = float(said)
        if said != 0:  # 0 is how llm-d's router says that there is none
            wishes[TTFT_KEY] = slo_ms(said, TTFT_HEADER.decode())
    if (tenant := headers.get(fairness_header.lower().encode())) is not None:
        if len(tenant) > MOST_NAME_CHARACTERS:
            named = short(tenant.decode("latin-1"))
            raise ConfigError(
                f"{fairness_header} {named}: must have at most {MOST_NAME_CHARACTERS} characters."
            )
        wishes[TENANT_KEY] = tenant.decode("latin-1")
    return wishes


def _rewritten(
    body: bytes, wishes: dict[str, Any], classes: frozenset[str], xargs: tuple[str, ...] = XARGS
) -> bytes | None:
    """Return a body with the wishes in it; None where nothing changes, or it is not what it should be.

    Whose a request is, only the header says: a client could take another's share, or everybody's in turn.

    Args:
        body: as it came.
        wishes: what its headers ask for.
        classes: the names of the classes.
        xargs: the key, or the path of keys, of what reaches the engine core.

    Raises:
        ConfigError: it asks for what is no SLO, or by a class's name that is no text.
    """
    if not wishes and not any(word in body for word in TELLING):
        return None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the server says what is wrong with it
    holder = values
    for key in xargs[:-1]:
        holder = holder.get(key) if isinstance(holder, dict) else None
    asked = holder.get(xargs[-1]) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or not (asked is None or isinstance(asked, dict)):
        return None
    asked = {key: value for key, value in (asked or {}).items() if key != TENANT_KEY} | wishes
    for key in (TBT_KEY, TTFT_KEY):
        if asked.get(key) is not None:
            slo_ms(asked[key], ".".join((*xargs, key)))
    tier = values.get(TIER)
    if isinstance(tier, str) and classes:
        if tier != NO_TIER and asked.get(CLASS_KEY) is None:
            asked[CLASS_KEY] = tier
        if tier in classes:  # vLLM would refuse it
            del values[TIER]
    if not _is_text(asked.get(CLASS_KEY)):  # the engine core cannot be told of it
        raise ConfigError(f"{CLASS_KEY} {short(asked[CLASS_KEY])}: must be text that UTF-8 can hold.")
    holder[xargs[-1]] = asked or None
    try:
        return json.dumps(values).encode()
    except (ValueError, RecursionError):
        return None


def _is_text(value: object) -> bool:
    """False for a string with half of a pair of surrogates in it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return True


class _Holding:
    """Sends an answer on, from its first piece of content on; a refusal takes its place."""

    def __init__(self, send: Send, refused: _Refused) -> None:
        self._send = send
        self._refused = refused
        self._start: Message | None = None
        self._held: list[Message] = []
        self._begun = self._done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start, self._begun = message, True
            return
        if self._done:
            return
        if self._start is not None:
            if await self.refuse():
                return
            if (
                message["type"] == "http.response.body"
                and not message.get("body")
                and message.get("more_body")
            ):
                return
            if self._refused.tells_first and not self._refused.answered and message.get("more_body"):
                self._held.append(message)
                return
            self._refused.stored = self._refused.tells_first and not self._refused.answered
            for each in (self._start, *self._held):
                await self._send(each)
            self._start, self._held = None, []
        await self._send(message)

    async def end(self) -> None:
        """Send what is still held back."""
        if self._start is not None and not self._done:
            await self({"type": "http.response.body", "body": b""})

    async def refuse(self) -> bool:
        """Answer why the request is refused, if it is and nothing has been sent; tell whether that was so."""
        why, sent = self._refused.why, self._start is None and self._begun
        if self._done or sent or (why is None and self._refused.wrong is None):
            return False
        start = self._start or {"type": "http.response.start", "headers": []}
        self._start, self._done = None, True
        if self._refused.wrong is not None:
            status, kind, message = 400, "Bad Request", self._refused.wrong
        else:
            assert why is not None
            status, kind, message = 429, "Too Many Requests", sentence(why)
        error = {"message": message, "type": kind, "param": None, "code": status, **(why or {})}
        body = json.dumps({"error": error}).encode()
        headers = [(k, v) for k, v in start.get("headers", ()) if not k.lower().startswith(b"content-")]
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if why is not None:
            headers.append((b"retry-after", str(math.ceil(why["retry_after_s"])).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
        return True


def serve_classes(config: SarathiConfig, middleware: list[str]) -> None:
    """Where requests may ask for SLOs, put the middleware among those of the server whose command line was read here.

    Headers and tiers speak of classes: without any, only what bodies ask for is looked at.
    """
    if config.slo_classes is not None:
        names = [each.name for each in config.slo_classes.classes]
        settings: dict[str, Any] = {"fairness_header": config.fairness_header, "classes": names}
    elif config.allow_request_slo:
        settings = {"fairness_header": None, "classes": []}
    else:
        return
    os.environ[SETTINGS_VARIABLE] = json.dumps(settings)
    if MIDDLEWARE not in middleware:
        middleware.append(MIDDLEWARE)


def note_refusals() -> None:
    """Have the engine of this API server tell the middleware of refusals; calling it again does nothing."""
    divert_outputs(refusal_error)
    engine = async_engine_class()
    if getattr(engine.generate, "notes_refusals", False):
        return
    engine.generate = _noting(engine.generate)
    engine.generate.notes_refusals = True


@functools.cache
def _refused_error_class() -> Any:
    """Return what a refused request ends with in its API server."""

    class RefusedError(generation_error_class()):  # type: ignore[misc]  # vLLM's, and known when this is called
        def __init__(self, why: Mapping[str, Any]) -> None:
            super().__init__(sentence(why))
            self.status_code = HTTPStatus.TOO_MANY_REQUESTS
            self.why = why

    return RefusedError


def refusal_error(output: Any) -> Exception | None:
    """Return what a request ends with by the engine core's word; None where that is no refusal."""
    if not is_refusal(output.stop_reason):
        return None
    error: Exception = _refused_error_class()(json.loads(output.stop_reason.removeprefix(REFUSED)))
    return error


def _forget_tenant(*arguments: Any) -> None:
    """Take the tenant out of sampling parameters that came in elsewhere (audio, as a form): its client has set it."""
    for each in arguments:
        extra_args = getattr(each, "extra_args", None)
        if isinstance(extra_args, dict):
            extra_args.pop(TENANT_KEY, None)


def _noting(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    @functools.wraps(generate)
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        refused = _refusal.get()
        if refused is None:
            _forget_tenant(*args, *kwargs.values())
        try:
            async with contextlib.aclosing(generate(*args, **kwargs)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    if refused is not None:
                        refused.answered = True
                    yield output
        except Exception as error:
            refusal = next(
                (e for e in (error, error.__cause__) if isinstance(e, _refused_error_class())), None
            )
            if refusal is None:
                raise
            if refused is not None:
                refused.answered, refused.why = True, refused.why or refusal.why
                if refused.stored:  # this alone makes vLLM store it as failed
                    raise asyncio.CancelledError(str(refusal)) from None
                if refused.fails_badly:
                    yield aborted_output()
                    return
            raise refusal from None

    return wrapper
