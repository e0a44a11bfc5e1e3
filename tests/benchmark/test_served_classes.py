"""A real `vllm serve` with a class file: classes by tier, body and header; refusals as 429, and vLLM's own 503."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import Server, serve

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

FLAGS = ["--served-model-name=tiny", "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--seed=0"]
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
CLASSES = """
default: standard
classes:
  impossible: {ttft_slo_ms: 0.5, tbt_slo_ms: 50, when_late: refuse, service_tiers: [priority]}
  standard: {ttft_slo_ms: 60000, tbt_slo_ms: 1000, when_late: relegate}
  night: {batch: true, service_tiers: [flex]}
"""
BODY: dict[str, Any] = {"model": "tiny", "prompt": "many words " * 20, "max_tokens": 5, "ignore_eos": True}
MOST_QUEUED = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("classes")
    tiny_model(folder / "tiny")
    (folder / "classes.yaml").write_text(CLASSES)
    flags = ["--slo-classes", str(folder / "classes.yaml"), "--calibration-dir", "none"]
    flags += ["--fairness-header", "X-Tenant", "--max-num-queued-reqs", str(MOST_QUEUED)]
    with serve(str(folder / "tiny"), [*FLAGS, *flags], log_path=folder / "server.log", env=ENV) as running:
        for _ in range(3):  # before anything is known, nobody is refused
            assert post(running).status_code == 200
        yield running


def post(server: Server, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    url = server.base_url + "/v1/completions"
    return httpx.post(url, json={**BODY, **body}, headers=headers, trust_env=False, timeout=60)


def check_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert error["code"] == 429
    assert error["slo_class"] == "impossible"
    assert error["predicted_ttft_ms"] > error["ttft_slo_ms"] == 0.5
    assert "cannot be met" in error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "asked",
    [
        {"service_tier": "priority"},
        {"service_tier": "impossible"},
        {"vllm_xargs": {"slo_class": "impossible"}},
        {"headers": {"x-slo-class": "impossible"}},
        {"headers": {"x-llm-d-slo-ttft-ms": "0.4"}},
        {"n": 3, "service_tier": "priority"},
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_a_429(server: Server, asked: dict[str, Any], stream: bool) -> None:
    check_refused(post(server, stream=stream, **asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"service_tier": "auto"},
        {"service_tier": "flex"},
        {"service_tier": "night"},
        {"service_tier": "gold"},
        {"vllm_xargs": {"slo_class": "nobody", "slo_tenant": "forged"}},
        {"headers": {"x-llm-d-slo-ttft-ms": "90000", "x-tenant": "me"}},
        {"headers": {"x-llm-d-slo-ttft-ms": "0"}},
    ],
    ids=str,
)
def test_what_can_be_kept_is_answered(server: Server, asked: dict[str, Any]) -> None:
    answer = post(server, **asked)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 5
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    streamed = post(server, stream=True, **asked)
    assert streamed.status_code == 200
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("stated", ["soon", "nan", "5e-324"])
def test_what_is_no_slo_is_answered_by_a_sentence(server: Server, stated: str, stream: bool) -> None:
    answer = post(server, stream=stream, headers={"x-llm-d-slo-ttft-ms": stated})
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert stated in said
    assert "must be a number of milliseconds from 0.1 to 3,600,000" in said


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"service_tier": ', 400),
        (b'{"service_tier": "flex", "vllm_xargs": 3}', 400),
        (b'["service_tier"]', 400),
        (b'{"service_tier": ' + b"[" * 100_000, 400),
        (b"", 400),
    ],
    ids=range(5),
)
def test_what_is_malformed_is_vllms_to_refuse(server: Server, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json", "x-tenant": "me"}
    url = server.base_url + "/v1/completions"
    assert httpx.post(url, content=body, headers=headers, trust_env=False, timeout=60).status_code == status


def test_nobody_is_lost_among_classes_refusals_aborts_and_vllms_own_limit(server: Server) -> None:
    async def one(client: httpx.AsyncClient, i: int) -> int | str:
        tier = ("priority", "flex", "auto")[i % 3]
        body = {**BODY, "service_tier": tier, "stream": i % 2 == 0, "max_tokens": 30}
        try:
            answer = await client.post(
                "/v1/completions",
                json=body,
                timeout=0.03 if i % 10 == 9 else 60,
                headers={"x-tenant": str(i % 4)},
            )
        except httpx.TimeoutException:
            return "gone"
        if answer.status_code == 429:
            check_refused(answer)
        elif answer.status_code == 503:
            assert "busy" in json.loads(answer.text)["error"]["message"]
        elif (
            '"code": 503' in answer.text
        ):  # a stream that vLLM had begun to answer: its own words, and then the end
            assert i % 2 == 0
            assert "busy" in answer.text
            assert answer.text.rstrip().endswith("data: [DONE]")
        else:
            assert answer.text.count('"finish_reason":"length"') == 1
        return answer.status_code

    async def all_of_them() -> list[int | str]:
        async with httpx.AsyncClient(base_url=server.base_url, trust_env=False) as client:
            return await asyncio.gather(*(one(client, i) for i in range(60)))

    told = asyncio.run(all_of_them())
    assert set(told) <= {200, 429, 503, "gone"}
    assert {200, 503} <= set(told)
    assert post(server).status_code == 200
