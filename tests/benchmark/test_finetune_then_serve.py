"""From a fine-tune with AutoLRS to a busy server that loads what came of it: the whole example, on the real model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.benchmark.live.streams import Delivery, Played, StreamRecord
from vllm_sarathi.benchmark.profile.trace import read_step_trace

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "finetune_then_serve.py"
MODEL = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("finetune_then_serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gaps_around_the_load_are_those_that_it_touches() -> None:
    """A gap that begins before the load and ends in it counts, and so does one that begins in it."""
    deliveries = tuple(Delivery(at_s, 1) for at_s in (0.0, 1.0, 1.5, 2.5, 4.0, 4.25))
    played = Played([StreamRecord("a", 0.0, deliveries, "", 1, 6)], 0.0)
    assert example().gaps_ms(played) == pytest.approx([1000, 500, 1000, 1500, 250])
    assert example().gaps_ms(played, 1.75, 2.75) == pytest.approx([1000, 1500])


def test_the_pairs_are_real_and_short() -> None:
    pairs = example().question_answer_pairs(4)
    assert len(dict(pairs)) == 4
    assert all(len(answer.split()) <= 12 for _, answer in pairs)


@pytest.mark.slow
@pytest.mark.timeout(1700)  # fifty training steps on one thread: 13 s each on a slow machine
@pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is missing")
def test_an_adapter_is_tuned_and_loaded_into_a_busy_server(tmp_path: Path) -> None:
    """What is asserted holds on a machine of any speed; whether the SLO was kept is printed, for it does not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # What the tests' own engines need, a server does not; one thread is fastest where other tests run beside this one.
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        environment.pop(name, None)
    command = [sys.executable, str(EXAMPLE), f"--out={tmp_path}", f"--model={MODEL}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["trained_answers_before"] == 0
    assert found["trained_answers_after"] >= 3  # of 4
    assert found["losses"][-1] < 0.25 * found["losses"][0]
    assert found["search_steps"] > 0
    assert found["unchanged"]  # the model itself answers as before
    assert not found["failed"]
    assert found["load_gaps"] >= 4  # every stream was decoding while the adapter was loaded
    # Our scheduler was at work, and what the trace has of it is under the SLO of this server.
    assert {step.slo_s for step in read_step_trace(tmp_path / "steps.jsonl")} == {found["tbt_slo_ms"] / 1e3}
