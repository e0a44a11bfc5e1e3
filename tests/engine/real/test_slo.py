"""An SLO kept on the real engine with a real model, and broken as soon as the budget is a constant."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.real.engines import RealEngine, buildable_after_numba
from vllm_sarathi import SarathiConfig
from vllm_sarathi.benchmark.live.reference_model import build_reference_model
from vllm_sarathi.core.fixed_budget import FixedBudget
from vllm_sarathi.core.types import ONE_STAGE

vllm = pytest.importorskip("vllm")

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[3] / "build/models/SmolLM2-135M-Instruct"
SLO_S = 0.25
LONG_TOKENS = 1900
"""Read in one step, this many tokens take a second on a fast machine: four times the SLO."""


@pytest.fixture(scope="module")
def engine() -> Iterator[RealEngine]:
    build_reference_model(MODEL)
    with buildable_after_numba():
        llm = vllm.LLM(
            str(MODEL),
            enforce_eager=True,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            num_gpu_blocks_override=128,
            block_size=32,
            enable_prefix_caching=False,
            **SarathiConfig(tbt_slo_ms=1e3 * SLO_S).engine_args(),
        )
    engine = RealEngine(llm, budget=2048)
    yield engine
    engine.close()


def longest_gaps_s(engine: RealEngine) -> list[float]:
    """Return the gaps of a stream into which two long prompts fall one after the other, longest first."""
    gaps_s: list[float] = []

    def scene(engine: RealEngine) -> None:
        engine.add("stream", list(range(100, 120)), max_tokens=400)
        engine.step(10)
        last_s = time.monotonic()
        for name in ("first", "second"):
            engine.add(name, [(7 * i) % 4000 + 100 for i in range(LONG_TOKENS)], max_tokens=1)
            while name not in engine.run.finished:
                engine.step()
                now_s = time.monotonic()
                gaps_s.append(now_s - last_s)
                last_s = now_s
        engine.abort("stream")

    engine.play(scene)
    return sorted(gaps_s, reverse=True)


def test_the_slo_is_kept_and_a_constant_budget_breaks_it(
    engine: RealEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From a cold start; twice the SLO, and one hiccup of the machine, are allowed for.
    assert longest_gaps_s(engine)[1] < 2 * SLO_S
    constant = FixedBudget(SarathiConfig(token_budget=2048), engine.scheduler.controller.model, ONE_STAGE)
    monkeypatch.setattr(engine.scheduler.controller, "policy", constant)
    assert longest_gaps_s(engine)[1] > 2 * SLO_S
