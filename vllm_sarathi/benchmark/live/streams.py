"""A client of the OpenAI-compatible streaming API that notes when each token arrives.

All times are seconds on one monotonic clock, those of one `play` counted from its start.

What is measured: a *delivery* is one event of the stream that carries new tokens, at the moment the client
reads it. A delivery usually holds one token; when the server has several ready at once (speculation, a busy
API server) it holds more, and `return_token_ids`, a vLLM extension, says how many. Servers without that
extension are counted as one token per delivery with text, and the total is taken from their closing usage
report.
"""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class StreamRequest:
    """One chat request, to be sent `send_at_s` after the start. `extra` is merged into the request's JSON.

    `after` names another stream and a number of tokens: then it is sent when that one has received this number, or
    when that one has ended. A scene told that way is the same on a fast machine and on a slow one.
    """

    name: str
    prompt: str
    max_tokens: int
    send_at_s: float = 0.0
    after: tuple[str, int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Delivery:
    """New tokens that reached the client together."""

    at_s: float
    tokens: int


@dataclass(frozen=True)
class StreamRecord:
    """What became of one request. `error` is None when the stream ran to its end."""

    name: str
    sent_s: float
    deliveries: tuple[Delivery, ...]
    text: str
    prompt_tokens: int
    output_tokens: int
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first delivery; None when nothing came."""
        return self.deliveries[0].at_s - self.sent_s if self.deliveries else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive deliveries: what a reader of this stream waited."""
        return [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(self.deliveries)]


@dataclass(frozen=True)
class Played:
    """What became of all requests, and how far the figures can be trusted.

    `client_stall_s` is the longest time that this client itself was kept from running. Whatever arrived meanwhile was
    noted late, and whatever was due was sent late: a long stall makes the run a measurement of the client's machine.
    """

    records: list[StreamRecord]
    client_stall_s: float


_HEARTBEAT_S = 0.05


async def play(
    base_url: str,
    model: str,
    requests: Sequence[StreamRequest],
    *,
    on_delivery: Callable[[StreamRequest, Delivery], None] | None = None,
    timeout_s: float = 600.0,
) -> Played:
    """Send every request at its time, greedy; the records come in the order of `requests`.

    `on_delivery` is called as tokens arrive, for progress. A request that fails leaves a record with its
    `error`.
    """
    # Every stream needs a connection of its own, or the client itself would hold requests back.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=base_url, trust_env=False, timeout=timeout_s, limits=limits
    ) as client:
        start_s = time.monotonic()
        cues = _Cues(requests)

        def note(request: StreamRequest, delivery: Delivery) -> None:
            cues.note(request, delivery.tokens)
            if on_delivery is not None:
                on_delivery(request, delivery)

        async def play_on_cue(request: StreamRequest) -> StreamRecord:
            await asyncio.sleep(max(0.0, start_s + request.send_at_s - time.monotonic()))
            await cues.wait(request)
            try:
                return await _play_one(client, model, request, start_s, note)
            finally:
                cues.ended(request)

        heart = asyncio.create_task(_longest_stall_s(finished := asyncio.Event()))
        records = await asyncio.gather(*map(play_on_cue, requests))
        finished.set()
        return Played(records, await heart)


class _Cues:
    """Which request waits for which token of which other request."""

    def __init__(self, requests: Sequence[StreamRequest]) -> None:
        self._tokens = dict.fromkeys((request.name for request in requests), 0.0)
        self._given = {request.after: asyncio.Event() for request in requests if request.after is not None}
        unknown = {name for name, _ in self._given} - self._tokens.keys()
        assert not unknown, f"a request waits for {unknown}, which is not played"

    async def wait(self, request: StreamRequest) -> None:
        """Return when it is the request's turn."""
        if request.after is not None:
            await self._given[request.after].wait()

    def note(self, request: StreamRequest, tokens: float) -> None:
        """Count new tokens of a stream, and give the cues that hang on them."""
        self._tokens[request.name] += tokens
        for (name, wanted), given in self._given.items():
            if name == request.name and self._tokens[name] >= wanted:
                given.set()

    def ended(self, request: StreamRequest) -> None:
        """Give every cue that hangs on a stream of which nothing more will come."""
        self.note(request, math.inf)


async def _longest_stall_s(finished: asyncio.Event) -> float:
    """How much later than asked for we were woken, at worst, until `finished`."""
    longest_s = 0.0
    while not finished.is_set():
        before_s = time.monotonic()
        await asyncio.sleep(_HEARTBEAT_S)
        longest_s = max(longest_s, time.monotonic() - before_s - _HEARTBEAT_S)
    return longest_s


async def _play_one(
    client: httpx.AsyncClient,
    model: str,
    request: StreamRequest,
    start_s: float,
    on_delivery: Callable[[StreamRequest, Delivery], None],
) -> StreamRecord:
    collected = _Collected()
    sent_s = time.monotonic() - start_s
    error = None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=_body(model, request)) as response:
            if response.is_error:
                raise _RefusedError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                delivery = collected.take(line, time.monotonic() - start_s)
                if delivery is not None:
                    on_delivery(request, delivery)
        if not collected.done:
            raise _RefusedError("the stream broke off before its end")
    except (httpx.HTTPError, json.JSONDecodeError, _RefusedError) as failure:
        error = str(failure) or type(failure).__name__
    return collected.record(request.name, sent_s, error)


class _RefusedError(Exception):
    """The server answered, but not with what was asked for."""


def _body(model: str, request: StreamRequest) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **request.extra,
    }


class _Collected:
    """What has come of one stream so far."""

    def __init__(self) -> None:
        self.done = False
        self._deliveries: list[Delivery] = []
        self._pieces: list[str] = []
        self._prompt_tokens = 0
        self._reported_tokens: int | None = None

    def take(self, line: str, at_s: float) -> Delivery | None:
        """Digest one line of the event stream; the delivery that it is, if it carries tokens."""
        if not line.startswith("data:"):
            return None
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            self.done = True
            return None
        event = json.loads(payload)
        if "error" in event:
            raise _RefusedError(str(event["error"])[:500])
        if usage := event.get("usage"):
            self._prompt_tokens = usage["prompt_tokens"]
            self._reported_tokens = usage["completion_tokens"]
        tokens = sum(self._take_choice(choice) for choice in event.get("choices", ()))
        if not tokens:
            return None
        delivery = Delivery(at_s, tokens)
        self._deliveries.append(delivery)
        return delivery

    def _take_choice(self, choice: Mapping[str, Any]) -> int:
        text = (choice.get("delta") or {}).get("content") or ""
        self._pieces.append(text)
        token_ids = choice.get("token_ids")
        return len(token_ids) if token_ids is not None else int(bool(text))

    def record(self, name: str, sent_s: float, error: str | None) -> StreamRecord:
        counted = sum(delivery.tokens for delivery in self._deliveries)
        return StreamRecord(
            name=name,
            sent_s=sent_s,
            deliveries=tuple(self._deliveries),
            text="".join(self._pieces),
            prompt_tokens=self._prompt_tokens,
            output_tokens=counted if self._reported_tokens is None else self._reported_tokens,
            error=error,
        )
