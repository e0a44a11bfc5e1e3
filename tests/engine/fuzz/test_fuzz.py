"""All of vLLM's features in any combination, against the real scheduler with its assertions on.

`FUZZ_STEPS=100000 pytest tests/engine/fuzz` or `python -m tests.engine.fuzz --steps 100000` looks for longer; the seed
that is printed with a finding, or the life itself, plays it again.
"""

import os
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine.fuzz.events import Add, Steps
from tests.engine.fuzz.life import Life
from tests.engine.fuzz.search import search
from tests.engine.fuzz.setups import POLICIES, STOCK, Setup

STEPS = int(os.environ.get("FUZZ_STEPS", "8000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_that_happens_breaks_a_policy(policy: str) -> None:
    result = search(STEPS // len(POLICIES), SEED, policy)
    assert not result.findings, "\n\n".join(map(str, result.findings.values()))


def test_stock_is_broken_by_cut_images_alone() -> None:
    """What the fuzz holds against us, vLLM's own scheduler keeps: else it would be the fuzz that is wrong."""
    result = search(STEPS // 8, SEED, STOCK)
    assert not [kind for kind in result.findings if "is cut at" not in kind], result.findings


@pytest.mark.parametrize("fault", ["lost", "held", "raised"])
def test_the_fuzz_finds_a_fault_and_cuts_it_down(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    add_request, schedule = Scheduler.add_request, Scheduler.schedule

    def lose_some(scheduler: Any, request: Any) -> None:
        add_request(scheduler, request)
        if fault == "lost" and request.request_id == "r4":
            scheduler.waiting.remove_request(request)

    def hold_or_raise(scheduler: Any, *args: Any) -> Any:
        if fault == "held" and "r4" in scheduler.requests:
            scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 0  # the second since vLLM 0.31
        if fault == "raised" and len(scheduler.running) > 2:
            raise RuntimeError("three at once")
        return schedule(scheduler, *args)

    monkeypatch.setattr(Scheduler, "add_request", lose_some)
    monkeypatch.setattr(Scheduler, "schedule", hold_or_raise)
    result = search(400, 0, STOCK)
    kinds = {"lost": "a request is lost", "held": "limits are not restored", "raised": "three at once"}
    found = [finding for kind, finding in result.findings.items() if kinds[fault] in kind]
    assert found
    assert len(found[0].events) <= 8


def test_a_life_is_the_same_each_time() -> None:
    def outputs() -> dict[str, list[int]]:
        life = Life(Setup("slo", caching=True))
        life.play([Add(100, 20, copies=5), Steps(7), Add(200, 5), Steps(3)])
        return life.engine.outputs

    assert outputs() == outputs()
