"""Engines that are spread over several processes, which vLLM starts by spawning: nothing of ours is inherited."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engine.real.engines import BUDGET, LONG, SETTINGS, RealEngine, Run, open_engine, prompt
from vllm_sarathi import SarathiConfig

pytestmark = pytest.mark.slow

LENGTHS = (5, LONG, BUDGET, 300, 17)
MAX_TOKENS = 16
STEPS_FOR_LONGEST = 300 // BUDGET
"""At least this number of steps passes before the longest prompt has been read under the budget; under stock's, one."""


REQUESTS: dict[str, Any] = {
    f"r{i}": {"prompt_token_ids": prompt(i, length)} for i, length in enumerate(LENGTHS)
}
PARAMS = SamplingParams(
    temperature=0.0, ignore_eos=True, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA
)


def scene(engine: RealEngine) -> None:
    for name, request in REQUESTS.items():
        engine.add(name, request["prompt_token_ids"], max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> Run:
    """What stock's scheduler answers in one process."""
    with open_engine(tiny) as stock:
        run = stock.play(scene)
    assert run.distinct == len(LENGTHS)
    assert run.chunks("r3") == 1
    return run


def test_tensor_parallel(tiny: Path, expected: Run) -> None:
    with open_engine(tiny, BUDGET, tensor_parallel_size=2) as ours:
        run = ours.play(scene)
    assert run.tokens == expected.tokens
    assert run.chunks("r3") > STEPS_FOR_LONGEST


def test_pipeline_parallel(tiny: Path, expected: Run) -> None:
    # vLLM's CPU pipeline fails in eager mode.
    compiled: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    with open_engine(tiny, BUDGET, pipeline_parallel_size=2, **compiled) as ours:
        assert ours.core.batch_queue_size == 2
        assert not isinstance(ours.scheduler, AsyncScheduler)
        run = ours.play(scene)
    assert run.tokens == expected.tokens
    assert run.chunks("r3") > STEPS_FOR_LONGEST


@pytest.fixture
def _spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM put the engine core into a process of its own, as it does unless it is told otherwise."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def check(arrivals: list[tuple[str, int]], expected: Run) -> None:
    """Check what arrived as (name, token). The scheduler is out of sight: that it is ours shows in who waits."""
    for name, sample in expected.tokens:
        assert [token for who, token in arrivals if who == name] == expected.tokens[name, sample]
    first_of_longest = next(i for i, (name, _) in enumerate(arrivals) if name == "r3")
    assert sum(name == "r0" for name, _ in arrivals[:first_of_longest]) >= STEPS_FOR_LONGEST


@pytest.mark.usefixtures("_spawned")
def test_llm_with_its_core_in_another_process(tiny: Path, expected: Run) -> None:
    engine = LLM(str(tiny), **SETTINGS, **SarathiConfig(token_budget=BUDGET).engine_args()).llm_engine
    arrivals: list[tuple[str, int]] = []
    try:
        assert not hasattr(engine.engine_core, "engine_core")
        for name, request in REQUESTS.items():
            engine.add_request(name, request, PARAMS)
        while engine.has_unfinished_requests():
            for output in engine.step():
                arrivals.extend((output.request_id, token) for token in output.outputs[0].token_ids)
    finally:
        engine.engine_core.shutdown()
    check(arrivals, expected)


@pytest.mark.usefixtures("_spawned")
def test_async_llm_streams_while_a_long_prompt_is_read(tiny: Path, expected: Run) -> None:
    """The engine of vLLM's server."""
    arrivals: list[tuple[str, int]] = []

    async def stream(engine: AsyncLLM, name: str) -> None:
        async for output in engine.generate(REQUESTS[name], PARAMS, name):
            arrivals.extend((name, token) for token in output.outputs[0].token_ids)

    async def everything() -> None:
        args = AsyncEngineArgs(str(tiny), **SETTINGS, **SarathiConfig(token_budget=BUDGET).engine_args())
        engine = AsyncLLM.from_engine_args(args)
        try:
            await asyncio.gather(*(stream(engine, name) for name in REQUESTS))
        finally:
            engine.shutdown()

    asyncio.run(everything())
    check(arrivals, expected)
