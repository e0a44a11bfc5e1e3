"""vLLM's application with our endpoint plugin in this process, before a scheduler of the real vLLM without a model."""

import asyncio
import json
from argparse import Namespace
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from vllm_sarathi.engine.endpoint import SarathiControl


class FakeCore:
    """What an `EngineClient` calls its engine core, of schedulers in this process.

    Args:
        schedulers: one for each engine.
    """

    def __init__(self, *schedulers: Any) -> None:
        self.schedulers = schedulers

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        assert method == "sarathi_control"
        return [scheduler.control.answer(*args) for scheduler in self.schedulers]


class Server:
    """An application with our routes.

    Args:
        core: the engine cores.
    """

    def __init__(self, core: Any) -> None:
        self.app = FastAPI()
        plugin = SarathiControl()
        plugin.attach_router(self.app)
        client = SimpleNamespace(engine_core=core)
        asyncio.run(plugin.init_state(client, self.app.state, Namespace()))

    def ask(self, method: str, path: str, body: bytes = b"", query: str | bytes = "") -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        return asyncio.run(self.ask_async(method, path, body, query))

    async def ask_async(
        self, method: str, path: str, body: bytes = b"", query: str | bytes = ""
    ) -> tuple[int, Any]:
        """`ask` in a running loop."""
        sent: list[MutableMapping[str, Any]] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": "/v1/sarathi" + path,
            "raw_path": b"/v1/sarathi" + path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query if isinstance(query, bytes) else query.encode(),
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        await self.app(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(text)
