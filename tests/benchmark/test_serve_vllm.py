"""A real `vllm serve` with a tiny model and each scheduler: the same answers, and what ours tells of itself.

It tells in its log, at its own /metrics and in the trace, and it remembers. Each start of a server takes half a minute,
so the one whose flags are in a file is also the one with an SLO that cannot be kept.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import Server, serve
from vllm_sarathi.benchmark.live.streams import StreamRecord, StreamRequest, play
from vllm_sarathi.benchmark.profile.trace import read_step_trace

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

FLAGS = ["--served-model-name=tiny", "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--seed=0"]
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
# Longer and shorter than the budget of the second run.
REQUESTS = [
    StreamRequest("short", "hello", 24),
    StreamRequest("long", "many words " * 30, 16, send_at_s=0.1),
    StreamRequest("another", "good morning", 24, send_at_s=0.1),
]
GAPS = sum(request.max_tokens - 1 for request in REQUESTS)

API_SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
PATIENCE_S = 90.0
METRIC = "vllm_sarathi_"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_model(folder)
    return folder


def streamed(server: Server) -> list[StreamRecord]:
    """Return what became of REQUESTS; every one is answered, and token by token."""
    records = asyncio.run(play(server.base_url, "tiny", REQUESTS)).records
    for record in records:
        assert record.error is None
        assert sum(delivery.tokens for delivery in record.deliveries) == record.output_tokens
    return records


def answers(folder: Path, log: Path, *flags: str) -> list[StreamRecord]:
    with serve(str(folder), [*FLAGS, *flags], log_path=log, env=ENV) as server:
        return streamed(server)


@pytest.fixture(scope="module")
def stock(tiny: Path) -> list[StreamRecord]:
    """What stock's scheduler answers."""
    log = tiny.parent / "stock.log"
    records = answers(tiny, log, "--scheduler", "default")
    assert "SarathiScheduler" not in log.read_text()
    assert len({record.text for record in records}) == len(REQUESTS)
    assert records[1].prompt_tokens == len(REQUESTS[1].prompt) + 1  # one per byte, and the beginning
    return records


def texts(records: Sequence[StreamRecord]) -> list[str]:
    return [record.text for record in records]


def test_both_schedulers_serve_and_stream_the_same_answers(
    tiny: Path, stock: list[StreamRecord], tmp_path: Path
) -> None:
    ours = answers(tiny, tmp_path / "ours.log", "--scheduler", "sarathi", "--token-budget", "20")
    assert "SarathiScheduler" in (tmp_path / "ours.log").read_text()
    assert texts(ours) == texts(stock)
    assert summarise_streams(ours)["completed"] == len(REQUESTS)


def figures(server: Server) -> dict[str, float]:
    """Return our figures at /metrics, those of the first engine."""
    page = httpx.get(server.base_url + "/metrics", trust_env=False).text
    ours = [line.removeprefix(METRIC) for line in page.splitlines() if line.startswith(METRIC)]
    return {line.partition("{")[0]: float(line.split()[-1]) for line in ours if "_bucket{" not in line}


def test_flags_from_a_file_and_an_slo_that_cannot_be_kept_is_told_wherever_an_operator_looks(
    tiny: Path, stock: list[StreamRecord], tmp_path: Path
) -> None:
    trace, log, kept = tmp_path / "steps.jsonl", tmp_path / "server.log", tmp_path / "kept"
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        f"scheduler: sarathi\ntbt-slo-ms: 0.1\nstep-trace: {trace}\ncalibration-dir: {kept}\n",
        encoding="utf-8",
    )
    body = {"model": "tiny", "prompt": "many words " * 20, "max_tokens": 200, "ignore_eos": True}
    flags = [*FLAGS, "--config", str(yaml)]
    with serve(str(tiny), flags, log_path=log, env=ENV, command=API_SERVER) as server:
        assert figures(server).get("steps_total", 0) == 0  # nothing has been done
        assert texts(streamed(server)) == texts(stock)
        deadline_s = time.monotonic() + PATIENCE_S
        sent = 0
        while (
            "slo_unattainable" not in (seen := figures(server)) or not kept.exists()
        ) and time.monotonic() < deadline_s:
            answer = httpx.post(server.base_url + "/v1/completions", json=body, trust_env=False, timeout=60)
            assert answer.status_code == 200
            sent += 1
    assert "SarathiScheduler" in log.read_text()
    assert seen["slo_unattainable"] == 1
    assert seen["tbt_slo_seconds"] == pytest.approx(1e-4)
    assert seen["gaps_kept_total"] == 0
    assert 0 < seen["gaps_total"] <= GAPS + 199 * sent
    assert seen["decode_step_seconds"] > 1e-4
    said = log.read_text()
    assert said.count("The SLO of 0.1 ms between tokens cannot be kept") == 1
    assert "0.0% of " in said
    # vLLM kills the engine's process at the end: what it did in its last second is lost, and no line is cut in two.
    decodes = sum(step.shape.decodes for step in read_step_trace(trace))
    assert seen["gaps_total"] <= decodes <= GAPS + 199 * sent
    assert len(list(kept.iterdir())) == 1
    assert "No calibration in" in said
