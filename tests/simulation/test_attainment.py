"""Three classes of SLOs in one stream, on the real scheduler: who is read first decides who keeps what."""

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.outcome import Outcome, outcome_of
from vllm_sarathi.simulation.simulator import RequestLog, Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

PLACE = "mistral-7b/a100"
DEADLINE: dict[str, Any] = {"tbt_slo_ms": 100, "prefill_order": "deadline", "allow_request_slo": True}


def play(
    requests: Sequence[SimulatedRequest], name: str = "sarathi", **settings: Any
) -> tuple[list[RequestLog], Outcome]:
    place = deployment(PLACE)
    scheduler = build(place, scheduler_choice(name, **settings))
    simulator = Simulator(scheduler, place.times(), requests, place.in_flight)
    simulator.run()
    assert scheduler.faults.total == 0
    return simulator.logs, outcome_of(simulator.logs)


@pytest.fixture(scope="module")
def classes() -> list[SimulatedRequest]:
    return synthetic("classes", 2.5, 160, seed=3)


def test_by_deadline_the_slos_are_met_and_everything_finishes(classes: list[SimulatedRequest]) -> None:
    _, outcome = play(classes, **DEADLINE)
    assert outcome.request_attainment is not None
    assert outcome.request_attainment >= 0.99
    assert outcome.completed == outcome.requests


@pytest.mark.parametrize("name", ["sarathi", "sarathi@256"])
def test_in_order_of_arrival_they_are_not(classes: list[SimulatedRequest], name: str) -> None:
    settings = {} if "@" in name else DEADLINE | {"prefill_order": "fcfs"}
    _, outcome = play(classes, name, **settings)
    assert outcome.request_attainment is not None
    assert outcome.request_attainment < 0.95


def test_an_slo_is_met_from_an_idle_start_beside_a_long_prompt() -> None:
    requests = [SimulatedRequest(0.0, 15_000, 20)]
    requests += [SimulatedRequest(0.05 + 0.3 * i, 200, 5, 50.0, 500.0) for i in range(10)]
    _, outcome = play(requests, **DEADLINE)
    assert outcome.request_attainment == 1.0


def test_who_comes_behind_a_long_queue_is_seen_at_once() -> None:
    requests = [SimulatedRequest(0.001 * i, 3000, 4) for i in range(400)]
    requests += [SimulatedRequest(5.0 + 0.5 * i, 100, 4, None, 500.0) for i in range(20)]
    _, outcome = play(requests, **DEADLINE, prefill_max_wait_s=1000)
    assert outcome.request_attainment == 1.0
    assert outcome.completed == 420


def test_far_beyond_capacity_nothing_waits_longer_than_stated() -> None:
    max_wait_s = 5.0
    # The old prompts are the last in each order but that of arrival, and there is more to do than can be done.
    old = [SimulatedRequest(2.0 + 0.01 * i, 12_000, 4) for i in range(5)]
    requests = old + [SimulatedRequest(i / 12, 1500, 4, None, 1000.0) for i in range(400)]
    requests.sort(key=lambda request: request.arrival_s)
    logs, outcome = play(requests, **DEADLINE, prefill_max_wait_s=max_wait_s)
    assert outcome.completed == len(requests)
    prefill_s = deployment(PLACE).prefill_s(12_000)
    before = 0.0
    waited = [log for log in logs if log.request.prompt_tokens == 12_000]
    for log in waited:
        before += prefill_s
        wait_s = log.token_s[0] - log.request.arrival_s
        assert wait_s <= max_wait_s + 2 * 1.3 * before + 1.0  # steps of a bounded length cost 30% at the most
    # The bound is what let them in: without it they wait until the others are done.
    late = [log for log in play(requests, **DEADLINE, prefill_max_wait_s=1000)[0] if log.request in old]
    assert late[0].token_s[0] > waited[0].token_s[0] + 5
