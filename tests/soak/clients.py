"""Clients of every kind for a real server, and what became of each of their requests."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.engine.test_control import malformed

PATIENCE_S = 120.0
"""A request without an end after so long is stuck."""

CLASS_NAMES = (
    "interactive",
    "standard",
    "night",
    "auto",
    "flex",
    "priority",
    "nobody",
    "",
    "\x00",
    "x" * 3000,
)
MAX_MODEL_LEN = 512

OWN_STATUS = frozenset({200, 400, 404, 422, 429, 503})
"""What a server that stands may answer: to what is malformed, to what is refused, to what is too much."""

Ask = Callable[[httpx.AsyncClient, random.Random], Any]


def body(chance: random.Random, **fields: Any) -> dict[str, Any]:
    """Return a request of any length and class; some are longer than the model takes."""
    words = chance.choice((1, 8, 40, 90, 90, 200))
    made: dict[str, Any] = {
        "model": "tiny",
        "prompt": "word " * words,
        "max_tokens": chance.choice((1, 5, 30, 60)),
        "ignore_eos": True,
        "n": chance.choice((1, 1, 1, 2)),
    }
    match chance.randrange(5):
        case 0:
            made["service_tier"] = chance.choice(CLASS_NAMES)
        case 1:
            made["vllm_xargs"] = {"slo_class": chance.choice(CLASS_NAMES), "slo_tenant": "forged"}
        case 2:
            made["vllm_xargs"] = {"ttft_slo_ms": chance.choice((-1, 0.001, 100, 1e12, "soon"))}
    return made | fields


def headers(chance: random.Random) -> dict[str, str]:
    """Return headers as routers send them, good and bad."""
    made = {"x-llm-d-inference-fairness-id": f"tenant-{chance.randrange(4)}"}
    if chance.random() < 0.3:
        made["x-slo-class"] = chance.choice(("interactive", "standard", "night", "nobody"))
    if chance.random() < 0.3:
        made["x-llm-d-slo-ttft-ms"] = chance.choice(("0.4", "90000", "soon", "nan", "-3"))
    return made


async def whole(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Ask, and wait for the whole answer."""
    answer = await client.post("/v1/completions", json=body(chance), headers=headers(chance))
    assert answer.status_code in OWN_STATUS, f"{answer.status_code}: {answer.text[:500]}"
    if answer.status_code == 200:
        assert all(choice["finish_reason"] == "length" for choice in answer.json()["choices"]), answer.text
    return str(answer.status_code)


async def streamed(
    client: httpx.AsyncClient, chance: random.Random, pause_s: float = 0.0, most_lines: int | None = None
) -> str:
    """Read a stream to its end, or leave after a number of lines."""
    asked, sent = body(chance, stream=True), headers(chance)
    async with client.stream("POST", "/v1/completions", json=asked, headers=sent) as answer:
        assert answer.status_code in OWN_STATUS, answer.status_code
        last, lines = "", 0
        async for line in answer.aiter_lines():
            last, lines = line or last, lines + 1
            if most_lines is not None and lines >= most_lines:
                return "left"
            if pause_s:
                await asyncio.sleep(pause_s)
        if answer.status_code == 200:
            assert last == "data: [DONE]", f"a stream ends with {last!r}"
        return str(answer.status_code)


async def slow(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Read a stream slowly."""
    return await streamed(client, chance, pause_s=0.05)


async def leaving(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Leave a stream after a few lines."""
    return await streamed(client, chance, most_lines=chance.randrange(1, 12))


async def impatient(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Go before there is any answer, perhaps."""
    try:
        await client.post("/v1/completions", json=body(chance, max_tokens=60), timeout=chance.random() / 5)
    except httpx.TimeoutException:
        return "left"
    return "answered"


async def babbling(client: httpx.AsyncClient, chance: random.Random) -> str:
    """Send what is no request, there or to the control endpoint."""
    method, path = chance.choice((("POST", "/v1/completions"), ("PATCH", "/v1/sarathi")))
    sent = {**headers(chance), "content-type": "application/json"}
    answer = await client.request(method, path, content=malformed(chance), headers=sent)
    assert answer.status_code < 500, answer.text[:500]
    return f"babble {answer.status_code}"


KINDS: tuple[Ask, ...] = (whole, whole, streamed, streamed, slow, leaving, impatient, babbling)


async def run(
    base_url: str, requests: int, seed: int, at_once: int, meanwhile: Callable[[], Any] | None = None
) -> Counter[str]:
    """Send requests, some of them at once, and count what became of them.

    Args:
        base_url: of the server.
        requests, at_once: how many.
        seed: which.
        meanwhile: a coroutine function for what happens to the server once half of them have been sent. An error of the
            transport counts as `cut off` then; else it is raised.

    Raises:
        AssertionError: an answer that no server should give.
        TimeoutError: a request has neither an answer nor an error.
    """
    became: Counter[str] = Counter()
    gate, half = asyncio.Semaphore(at_once), asyncio.Event()
    # A server that has stood still closes its idle connections, just as one of them may be taken again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=base_url, trust_env=False, timeout=PATIENCE_S, limits=limits
    ) as client:

        async def one(index: int) -> None:
            chance = random.Random(seed * 1_000_003 + index)
            async with gate:
                if index >= requests // 2:
                    half.set()
                try:
                    said = await asyncio.wait_for(chance.choice(KINDS)(client, chance), PATIENCE_S)
                except (httpx.TransportError, AssertionError):
                    if meanwhile is None:
                        raise
                    said = "cut off"
                became[said] += 1

        async def happen() -> None:
            await half.wait()
            if meanwhile is not None:
                await meanwhile()

        async with asyncio.TaskGroup() as group:
            group.create_task(happen())
            for index in range(requests):
                group.create_task(one(index))
    assert sum(became.values()) == requests
    return became
