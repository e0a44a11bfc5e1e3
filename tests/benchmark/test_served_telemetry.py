"""A real `vllm serve` tells what it does: in its log, at its own /metrics, in the trace; and remembers."""

import time
from pathlib import Path

import httpx
import pytest

from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import Server, serve
from vllm_sarathi.benchmark.profile.trace import read_step_trace

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

FLAGS = ["--served-model-name=tiny", "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--seed=0"]
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
PATIENCE_S = 90.0
METRIC = "vllm_sarathi_"


def figures(server: Server) -> dict[str, float]:
    """Return our figures at /metrics, those of the first engine."""
    page = httpx.get(server.base_url + "/metrics", trust_env=False).text
    ours = [line.removeprefix(METRIC) for line in page.splitlines() if line.startswith(METRIC)]
    return {line.partition("{")[0]: float(line.split()[-1]) for line in ours if "_bucket{" not in line}


def test_an_slo_that_cannot_be_kept_is_told_wherever_an_operator_looks(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    trace, log, kept = tmp_path / "steps.jsonl", tmp_path / "server.log", tmp_path / "kept"
    flags = ["--tbt-slo-ms", "0.1", "--step-trace", str(trace), "--calibration-dir", str(kept)]
    body = {"model": "tiny", "prompt": "many words " * 20, "max_tokens": 200, "ignore_eos": True}
    with serve(str(tmp_path / "tiny"), [*FLAGS, *flags], log_path=log, env=ENV) as server:
        assert figures(server).get("steps_total", 0) == 0  # nothing has been done
        deadline_s = time.monotonic() + PATIENCE_S
        sent = 0
        while (
            "slo_unattainable" not in (seen := figures(server)) or not kept.exists()
        ) and time.monotonic() < deadline_s:
            answer = httpx.post(server.base_url + "/v1/completions", json=body, trust_env=False, timeout=60)
            assert answer.status_code == 200
            sent += 1
    assert seen["slo_unattainable"] == 1
    assert seen["tbt_slo_seconds"] == pytest.approx(1e-4)
    assert seen["gaps_kept_total"] == 0
    assert 0 < seen["gaps_total"] <= 199 * sent
    assert seen["decode_step_seconds"] > 1e-4
    said = log.read_text()
    assert said.count("The SLO of 0.1 ms between tokens cannot be kept") == 1
    assert "0.0% of " in said
    # vLLM kills the engine's process at the end: what it did in its last second is lost, and no line is cut in two.
    decodes = sum(step.shape.decodes for step in read_step_trace(trace))
    assert seen["gaps_total"] <= decodes <= 199 * sent
    assert len(list(kept.iterdir())) == 1
    assert "No calibration in" in said
