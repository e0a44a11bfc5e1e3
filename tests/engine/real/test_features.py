"""Features of vLLM that are switched on when the engine is built, each under both schedulers."""

import re
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.real.adapters import write_adapter
from tests.engine.real.engines import BUDGET, LONG, RealEngine, open_pair, prompt

pytestmark = pytest.mark.slow


def test_lora(tiny: Path, tmp_path: Path) -> None:
    adapters = [
        LoRARequest(name, i, str(write_adapter(tmp_path / name, seed=i)))
        for i, name in enumerate(("one", "two"), start=1)
    ]

    def together(engine: RealEngine) -> None:
        engine.add("base", prompt(0, LONG))
        engine.add("one", prompt(0, LONG), lora_request=adapters[0])
        engine.step(2)
        engine.add("two", prompt(0, LONG), lora_request=adapters[1])
        engine.add("one-short", prompt(1, 9), lora_request=adapters[0])
        engine.add("base-short", prompt(1, 9))

    def alone(engine: RealEngine) -> None:
        engine.add("base", prompt(0, LONG))

    # One slot more than adapters: on a CPU, vLLM applies what is in the last slot to requests without an adapter.
    with open_pair(tiny, enable_lora=True, max_loras=3, max_lora_rank=8) as pair:
        _, ours = pair.compare(together)
        base = pair.stock.play(alone).of("base")
    assert ours.distinct == 5
    assert ours.of("base") == base
    assert all(ours.chunks(name) >= LONG // BUDGET for name in ("base", "one", "two"))


def test_ngram_speculative_decoding(tiny: Path) -> None:
    def scene(engine: RealEngine) -> None:
        engine.add("short", prompt(0, 7), max_tokens=60)
        engine.add("repeating", prompt(1, 20) * 5, max_tokens=60)
        engine.step(8)
        engine.add("long", prompt(2, 300), max_tokens=60)

    def crowd(engine: RealEngine) -> None:
        for i in range(14):
            engine.add(f"r{i}", prompt(i, 5) * 3, max_tokens=40)

    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with open_pair(tiny, budget=16, speculative_config=ngram) as pair:
        runs = pair.compare(scene)
        _, crowded = pair.compare(crowd)
    for run in runs:
        assert any(step.drafts for step in run.steps)
        assert any(len(delta.tokens) > 1 for delta in run.deltas), "no draft was accepted"
    ours = runs[1]
    assert ours.distinct == 3
    assert ours.chunks("long") > 300 // 16
    for step in ours.steps:
        assert step.decodes_before <= step.scheduled.keys()
    # With their drafts, fourteen decodes are more than the budget holds: they take turns.
    assert crowded.distinct == 14
    assert any(step.decodes_before - step.scheduled.keys() for step in crowded.steps)


def test_priorities(tiny: Path) -> None:
    def scene(engine: RealEngine) -> None:
        for i, priority in enumerate((2, 2, 2, 1, 0)):
            engine.add(f"r{i}", prompt(i, 50), priority=priority, arrival_time=float(i))

    with open_pair(tiny, scheduling_policy="priority", max_num_seqs=1) as pair:
        stock, ours = pair.compare(scene)
    assert ours.finished == stock.finished == ["r4", "r3", "r0", "r1", "r2"]
    assert ours.distinct == 5
    assert ours.chunks("r0") == 2


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_preemption_in_a_cache_too_small(tiny: Path, policy: str) -> None:
    def scene(engine: RealEngine) -> None:
        for i, length in enumerate((60, 20, 150, 90, 10)):
            engine.add(f"r{i}", prompt(i, length), max_tokens=60, priority=-i if policy == "priority" else 0)
            engine.step(3)

    with open_pair(tiny, max_model_len=256, num_gpu_blocks_override=10, scheduling_policy=policy) as pair:
        stock, ours = pair.compare(scene)
    assert stock.preempted
    assert ours.preempted
    assert ours.distinct == 5
    assert all(len(tokens) == 60 for tokens in ours.tokens.values())


def test_asynchronous_scheduling(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU platform switches it off; here it is put back to what vLLM resolved."""
    configure = CpuPlatform.check_and_update_config.__func__

    def keep(platform: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        configure(platform, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    def scene(engine: RealEngine) -> None:
        for i, length in enumerate((5, LONG, BUDGET, 300, 40)):
            engine.add(f"r{i}", prompt(i, length), max_tokens=30)
            engine.step(2)
        date = StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}")
        engine.add("date", "and the date was " * 3, structured_outputs=date, ignore_eos=False)
        engine.add("victim", prompt(9, 400), max_tokens=60)
        engine.step(20)
        engine.abort("victim")

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    with open_pair(tiny, async_scheduling=True) as pair:
        for engine in (pair.stock, pair.ours):
            assert isinstance(engine.scheduler, AsyncScheduler)
            assert engine.core.batch_queue_size == 2
        _, ours = pair.compare(scene, aborted="victim")
    assert ours.distinct == 6
    assert ours.chunks("r3") > 300 // BUDGET
    assert ours.chunks("victim") > 1
    assert ("victim", 0) not in ours.tokens
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", ours.texts["date", 0])
