"""How fast a device prefills and decodes: single requests to the stock server, one after the other, within a minute."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live.scale import Scale, Speeds
from vllm_sarathi.benchmark.live.server import (
    SERVED_NAME,
    SERVER_FLAGS,
    ServerError,
    log_tail,
    serve,
    server_env,
)
from vllm_sarathi.core.config import STOCK_SCHEDULER
from vllm_sarathi.core.files import write_whole

READ_TOKENS = 2000
DECODED_TOKENS = 33
DECODED_PROMPT_TOKENS = 8
"""So few that reading them is a step like the others."""

REPEATS = 5
ENOUGH_S = 15.0
"""A measurement that has taken this time is not repeated."""
TIMEOUT_S = 600.0

KV_BLOCKS = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
LABEL = re.compile(r'(block_size|num_gpu_blocks)="(\d+)"')
WORDS = range(32, 256)
"""Token ids that every vocabulary has."""


def find_scale(model: str, out: Path, resume: bool, stages: Stages) -> Scale:
    """Return the scale for this device and model; with `resume`, the one that an earlier run has left in `out`.

    Raises:
        ServerError: the server did not come up, or does not answer.
        RuntimeError: the model's context is too short.
    """
    path = out / "scale.json"
    if resume and (kept := _kept(path, model)) is not None:
        return kept
    stages.begin("--scale auto: starting a stock server")
    flags = [*SERVER_FLAGS, "--max-model-len=auto", "--scheduler", STOCK_SCHEDULER]
    log_path = out / "scale.server.log"
    with serve(model, flags, log_path=log_path, env=server_env(model)) as server:
        stages.begin("--scale auto: measuring how fast it prefills and decodes")
        try:
            speeds = measure(server.base_url)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise ServerError(
                f"--scale auto: the server gave no answer ({error})\n{log_tail(log_path)}"
            ) from error
    scale = Scale.of(speeds)
    write_whole(path, json.dumps({"model": model, **scale.to_json()}, indent=2) + "\n")
    return scale


def _kept(path: Path, model: str) -> Scale | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Scale.from_json(told) if told["model"] == model else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(base_url: str) -> Speeds:
    """Return the speeds of a stock server that has nothing else to do.

    Where prompts will be lengthened, reading is measured of long ones: attention makes their tokens slower to read.

    Raises:
        httpx.HTTPError: it does not answer, or refuses.
        KeyError, ValueError: it answers with something else.
    """
    with httpx.Client(base_url=base_url, trust_env=False, timeout=TIMEOUT_S) as client:
        context = int(_get(client, "/v1/models").json()["data"][0]["max_model_len"])
        _answer_s(client, DECODED_PROMPT_TOKENS, 2)  # the first steps of a process are slower

        def reading(tokens: int) -> float:
            tokens = min(tokens, context - 1)
            return tokens / _least_s(client, tokens, 1)

        speeds = Speeds(
            reading(READ_TOKENS),
            _least_s(client, DECODED_PROMPT_TOKENS, DECODED_TOKENS) / DECODED_TOKENS,
            context,
            kv_tokens(_get(client, "/metrics").text),
        )
        lengthened = Scale.of(speeds).prompts
        if lengthened > 1:
            speeds = replace(speeds, reading_tokens_per_s=reading(round(READ_TOKENS * lengthened)))
    return speeds


def kv_tokens(metrics: str) -> int | None:
    """Return how many tokens the KV caches of all engines hold, of vLLM's metrics; None where they do not say."""
    sizes = [dict(LABEL.findall(labels)) for labels in KV_BLOCKS.findall(metrics)]
    if not sizes or any(len(each) < 2 for each in sizes):
        return None
    return sum(int(each["block_size"]) * int(each["num_gpu_blocks"]) for each in sizes)


def _least_s(client: httpx.Client, prompt_tokens: int, output_tokens: int) -> float:
    """Return the shortest of some answers' times: what else the machine does only adds."""
    started_s = time.monotonic()
    times_s = [_answer_s(client, prompt_tokens, output_tokens)]
    while len(times_s) < REPEATS and time.monotonic() - started_s < ENOUGH_S:
        times_s.append(_answer_s(client, prompt_tokens, output_tokens))
    return min(times_s)


def _answer_s(client: httpx.Client, prompt_tokens: int, output_tokens: int) -> float:
    body: dict[str, Any] = {
        "model": SERVED_NAME,
        "prompt": [WORDS[i * 37 % len(WORDS)] for i in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    started_s = time.monotonic()
    answer = client.post("/v1/completions", json=body)
    seconds = time.monotonic() - started_s
    answer.raise_for_status()
    came = answer.json()["usage"]["completion_tokens"]
    if came != output_tokens:
        raise ValueError(f"{came} tokens came instead of {output_tokens}")
    return seconds


def _get(client: httpx.Client, path: str) -> httpx.Response:
    return client.get(path).raise_for_status()
