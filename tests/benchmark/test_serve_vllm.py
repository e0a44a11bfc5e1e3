"""The server and the client around a real `vllm serve`, with a tiny model and each scheduler."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import serve
from vllm_sarathi.benchmark.live.streams import StreamRecord, StreamRequest, play

pytest.importorskip("vllm")

FLAGS = ["--served-model-name=tiny", "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--seed=0"]
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
# Longer and shorter than the budget of the second run.
REQUESTS = [
    StreamRequest("short", "hello", 24),
    StreamRequest("long", "many words " * 30, 16, send_at_s=0.1),
    StreamRequest("another", "good morning", 24, send_at_s=0.1),
]


API_SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def answers(
    folder: Path, log: Path, *scheduler_flags: str, command: Sequence[str] | None = None
) -> list[StreamRecord]:
    flags = [*FLAGS, *scheduler_flags]
    with serve(str(folder), flags, log_path=log, env=ENV, command=command) as server:
        return asyncio.run(play(server.base_url, "tiny", REQUESTS)).records


@pytest.mark.slow
def test_both_schedulers_serve_and_stream_the_same_answers(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    stock = answers(tmp_path / "tiny", tmp_path / "stock.log", "--scheduler", "default")
    ours = answers(tmp_path / "tiny", tmp_path / "ours.log", "--scheduler", "sarathi", "--token-budget", "20")
    yaml = tmp_path / "config.yaml"
    yaml.write_text("scheduler: sarathi\ntoken-budget: 20\n")
    from_file = answers(tmp_path / "tiny", tmp_path / "file.log", "--config", str(yaml), command=API_SERVER)
    assert "SarathiScheduler" not in (tmp_path / "stock.log").read_text()
    for log in ("ours.log", "file.log"):
        assert "SarathiScheduler" in (tmp_path / log).read_text()
    for record in (*stock, *ours, *from_file):
        assert record.error is None
        assert sum(delivery.tokens for delivery in record.deliveries) == record.output_tokens
    expected = [record.text for record in stock]
    assert len(set(expected)) == len(REQUESTS)
    assert [record.text for record in ours] == [record.text for record in from_file] == expected
    assert stock[1].prompt_tokens == len(REQUESTS[1].prompt) + 1  # one per byte, and the beginning
    assert summarise_streams(ours)["completed"] == len(REQUESTS)
