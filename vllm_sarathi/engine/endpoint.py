"""Live control over HTTP: vLLM's endpoint plugin `sarathi_control`, off unless VLLM_PLUGINS names it.

    GET   /v1/sarathi                              state and settings of each engine
    PATCH /v1/sarathi                              {"tbt_slo_ms": 150}: change settings, null for the default
    POST  /v1/sarathi/step_trace/start, .../stop   the step trace
    GET   /v1/sarathi/when_first_token?tokens=N    how long a prompt would wait, and whether it can be kept

The paths begin with /v1 since that is what vLLM's `--api-key` guards. Whoever has the key to generate has the one to
change SLOs, too: where that is not meant, let the proxy in front keep /v1/sarathi to itself.

One sentence says what is wrong with a request (4xx). 503 means that an engine is gone or does not answer.
"""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response

from vllm_sarathi.core.classes import slo_ms
from vllm_sarathi.core.errors import ConfigError, short
from vllm_sarathi.core.plain import no_twins
from vllm_sarathi.engine.vllm.internals import logger
from vllm_sarathi.engine.vllm.utility import NoControlError, ask_engines

PATH = "/v1/sarathi"
NOT_OURS = "this server does not run a scheduler of vllm-sarathi; start it with --scheduler sarathi."
MOST_BODY_BYTES = 16_384
MOST_PROMPT_TOKENS = 100_000_000
PATIENCE_S = 60.0
"""A command waits for the step at hand; an engine that is silent for this time is stuck."""


class SarathiControl:
    """The endpoint plugin, as vLLM loads it."""

    name = "sarathi_control"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine_client: Any = None
        self._ours = True
        self._lock = asyncio.Lock()

    def attach_router(self, app: Any) -> None:
        """Add our routes to vLLM's application."""

        async def state(call: Request) -> Response:
            return await self._answer({"command": "state"})

        async def change(call: Request) -> Response:
            try:
                settings = read_settings(await _body(call))
            except ConfigError as error:
                return _reply(400, {"error": str(error)})
            async with self._lock:  # every engine sees all changes in the same order
                return await self._answer({"command": "change", "settings": settings})

        async def start(call: Request) -> Response:
            return await self._answer({"command": "trace", "on": True})

        async def stop(call: Request) -> Response:
            return await self._answer({"command": "trace", "on": False})

        async def first_token(call: Request) -> Response:
            try:
                asked = read_first_token(dict(call.query_params))
            except ConfigError as error:
                return _reply(400, {"error": str(error)})
            return await self._answer({"command": "first_token", **asked})

        for method, path, handler in (
            ("GET", "", state),
            ("PATCH", "", change),
            ("POST", "/step_trace/start", start),
            ("POST", "/step_trace/stop", stop),
            ("GET", "/when_first_token", first_token),
        ):
            app.add_api_route(PATH + path, handler, methods=[method])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the way to the engines."""
        self._engine_client = engine_client
        logger.info("vllm-sarathi can be controlled at %s.", PATH)

    async def _answer(self, command: dict[str, Any]) -> Response:
        """Ask every engine, and answer with what they say; where they refuse, with what the first says."""
        if not self._ours:
            return _reply(409, {"error": NOT_OURS})
        try:
            asked = ask_engines(self._engine_client, json.dumps(command))
            answers = [json.loads(text) for text in await asyncio.wait_for(asked, PATIENCE_S)]
        except NoControlError:
            self._ours = False  # it never will be, and each question is an error in the engine's log
            return _reply(409, {"error": NOT_OURS})
        except TimeoutError:
            return _reply(503, {"error": f"the engine has not answered for {PATIENCE_S:g} seconds."})
        except Exception as error:
            logger.warning("A control command did not reach the engine: %r", error)
            return _reply(503, {"error": "the engine cannot be reached; see the server's log."})
        for answer in answers:
            if answer["status"] != 200:
                return _reply(answer["status"], {"error": answer["error"]})
        for answer in answers:
            del answer["status"]
        return _reply(200, {"engines": answers})


async def _body(call: Request) -> bytes:
    """Return the body of a call.

    Raises:
        ConfigError: it is too long.
    """
    body = b""
    async for part in call.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise ConfigError(f"the body is longer than {MOST_BODY_BYTES} bytes.")
    return body


def _reply(status: int, content: dict[str, Any]) -> Response:
    # Not starlette's JSONResponse: what is quoted of a bad value may be no text that UTF-8 can hold.
    return Response(json.dumps(content) + "\n", status_code=status, media_type="application/json")


def read_settings(body: bytes) -> dict[str, Any]:
    """Return the settings in a body.

    Raises:
        ConfigError: it is not a JSON object.
    """
    try:
        settings = json.loads(
            body, parse_constant=_no_number, object_pairs_hook=lambda pairs: no_twins(pairs, "the body")
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not valid JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"the body must be a JSON object of settings, not {type(settings).__name__}.")
    if not settings:
        raise ConfigError('the body names no setting; for example {"tbt_slo_ms": 150}.')
    return settings


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_first_token(query: dict[str, str]) -> dict[str, int | float | str]:
    """Return what a query asks of a first token.

    Raises:
        ConfigError: a parameter is missing, unknown, or no number.
    """
    unknown = sorted(set(query) - {"tokens", "ttft_slo_ms", "slo_class"})
    if unknown:
        raise ConfigError(f"unknown parameter {short(unknown[0])}; valid: tokens, ttft_slo_ms, slo_class.")
    if "tokens" not in query:
        raise ConfigError("the parameter tokens is missing: the length of the prompt.")
    asked: dict[str, int | float | str] = {"tokens": _prompt_tokens(query["tokens"])}
    if "ttft_slo_ms" in query:
        try:
            asked["ttft_slo_ms"] = slo_ms(float(query["ttft_slo_ms"]), "ttft_slo_ms")
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"ttft_slo_ms {short(query['ttft_slo_ms'])}: must be a number.") from error
    if "slo_class" in query:
        asked["slo_class"] = query["slo_class"]
    return asked


def _prompt_tokens(text: str) -> int:
    is_short = len(text) <= len(str(MOST_PROMPT_TOKENS))
    value = int(text) if is_short and text.isascii() and text.isdigit() else 0
    if not 0 < value <= MOST_PROMPT_TOKENS:
        raise ConfigError(
            f"tokens {short(text)}: must be a whole number above 0 and at most {MOST_PROMPT_TOKENS:g}."
        )
    return value
