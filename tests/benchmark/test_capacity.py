"""The capacity search: on functions whose answer is known, and on a simulated deployment."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.simulation.places import requests_at_once, simulator
from vllm_sarathi.benchmark.capacity import search as capacity
from vllm_sarathi.benchmark.capacity.search import (
    TOLERANCE,
    Criterion,
    Found,
    RequestSource,
    Task,
    Watch,
    confidence_range,
    find,
    first_rate,
    row_of,
    search,
    simulate_task,
)
from vllm_sarathi.simulation.deployment import build
from vllm_sarathi.simulation.outcome import Outcome, outcome_of
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest


def outcome(gaps_s: list[float], delays_s: list[float], kept: list[bool] | None = None) -> Outcome:
    return Outcome(
        np.array(gaps_s), np.array([0.1]), np.array(delays_s), np.array(kept or [], dtype=bool), 1, 1, 1.0
    )


# --- Bracketing and bisection ---


@pytest.mark.parametrize("start", [0.001, 0.9, 1.0, 30.0])
@pytest.mark.parametrize("capacity_qps", [0.05, 1.0, 3.337])
def test_the_rate_is_found_from_below(capacity_qps: float, start: float) -> None:
    tried: list[float] = []

    def run(rate: float) -> bool:
        tried.append(rate)
        return rate <= capacity_qps

    found = search(run, start)
    in_reach = start / 1024 <= capacity_qps <= start * 40  # brackets are steps of 1.6
    if not in_reach:
        assert found is None or found >= start
        return
    assert found is not None
    assert found <= capacity_qps < found * (1 + TOLERANCE)
    assert found in tried
    assert len(tried) < 30


def test_what_no_rate_meets_and_what_every_rate_meets() -> None:
    assert search(lambda rate: False, 1.0) is None
    everything = search(lambda rate: True, 1.0)
    assert everything is not None
    assert 40.0 < everything <= 64.0  # the highest that was tried


def test_a_run_that_is_not_monotone_gives_a_rate_that_was_carried() -> None:
    carried: set[float] = set()

    def run(rate: float) -> bool:
        if math.sin(40 * rate) > -0.5 and rate < 2.0:
            carried.add(rate)
            return True
        return False

    assert search(run, 0.5) in carried


# --- The criterion ---


def test_the_papers_criterion() -> None:
    criterion = Criterion(tbt_slo_ms=100.0)
    quick = [0.01] * 99
    assert criterion.holds(outcome([*quick, *quick, 0.2], [1.0]))
    assert not criterion.holds(outcome([*quick, 0.2, 0.2], [1.0]))
    assert not criterion.holds(outcome(quick, [1.9, 2.1, 2.1]))
    assert criterion.holds(outcome(quick, [1.9, 1.9, 99.0]))  # the median counts
    assert Criterion(None).holds(outcome([9.0] * 9, [1.0]))
    assert Criterion(100.0, max_delay_s=5.0).holds(outcome(quick, [4.0]))


def test_goodput_is_the_share_of_kept_slos() -> None:
    criterion = Criterion(100.0, goodput=0.9)
    assert criterion.holds(outcome([9.0], [9.0], [True] * 9 + [False]))
    assert not criterion.holds(outcome([0.01], [0.1], [True] * 8 + [False] * 2))
    assert not criterion.holds(outcome([0.01], [0.1]))


# --- The early stop ---

LOADS = {
    "light": requests_at_once(*[(100, 40)] * 60, gap_s=0.5),
    "crowded": requests_at_once(*[(600, 60)] * 80, gap_s=0.004),
    "at once": requests_at_once(*[(300, 80)] * 80, gap_s=0.0),
    "stalled": requests_at_once(*[(20, 200)] * 20, *[(1900, 20)] * 40, gap_s=0.01),
    "with-slo": [
        SimulatedRequest(0.006 * i, 200 + 9 * i, 40, tbt_slo_ms=2.0, ttft_slo_ms=60.0) for i in range(80)
    ],
}
CRITERIA = {
    "gaps": Criterion(tbt_slo_ms=1.5),
    "wide": Criterion(tbt_slo_ms=4.0),
    "delay": Criterion(None, max_delay_s=0.05),
    "goodput": Criterion(None, goodput=0.9),
}


@pytest.mark.parametrize("name", ["default", "prefill-first", "sarathi@128"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("load", LOADS)
def test_the_early_stop_never_changes_the_answer(load: str, criterion: str, name: str) -> None:
    if criterion == "goodput" and load != "with-slo":
        pytest.skip("no SLO of their own")
    requests, judge = LOADS[load], CRITERIA[criterion]
    whole = simulator(requests, name)
    whole.run()
    watched = simulator(requests, name)
    watch, looked = Watch(judge, requests), 0

    def look(run: object) -> bool:
        nonlocal looked
        looked += 1
        return watch(watched)

    watched.run(look)
    holds = judge.holds(outcome_of(whole.logs))
    if watched.given_up:
        assert not holds, "a run was given up that would have held"
        assert watched.steps < whole.steps
    else:
        assert outcome_of(watched.logs).to_mapping() == outcome_of(whole.logs).to_mapping()


def test_the_early_stop_stops_early() -> None:
    requests = LOADS["at once"] * 3
    engine = simulator(requests, "sarathi@128")
    engine.run(Watch(Criterion(tbt_slo_ms=0.1), requests))
    assert engine.given_up


# --- Found in a simulation ---

CHAT = Task("mistral-7b/a100", "sarathi@512", RequestSource("chat", 48), Criterion(100.0))


def test_the_same_task_gives_the_same_answer_and_it_is_the_highest_rate() -> None:
    found = find(CHAT)
    assert find(CHAT) == found
    assert found.qps is not None
    assert CHAT.criterion.holds(simulate_task(CHAT, found.qps))  # type: ignore[arg-type]
    above = simulate_task(CHAT, found.qps * (1 + TOLERANCE))
    assert above is None or not CHAT.criterion.holds(above)
    assert found.outcome["gap_ms"]["p99"] <= 100.0
    assert first_rate(CHAT) / 8 < found.qps < first_rate(CHAT) * 8


def test_a_cache_beyond_what_the_load_needs_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []

    def counted(place: Any, choice: Any, shared: bool, enough_tokens: int | None) -> Any:
        made = build(place, choice, shared, enough_tokens=None if whole else enough_tokens)
        blocks.append(made.kv_cache_manager.block_pool.num_gpu_blocks)
        return made

    monkeypatch.setattr("vllm_sarathi.benchmark.capacity.search.build", counted)
    task = Task("mistral-7b/a100:tp8", "sarathi", RequestSource("chat", 40), Criterion(60.0), 1)
    seen = []
    for whole in (True, False):  # noqa: B007 (`counted` reads it)
        outcome = simulate_task(task, 20.0, to_the_end=True)
        assert outcome is not None
        seen.append(outcome.to_mapping())
    assert seen[0] == seen[1]
    assert blocks[0] > 10 * blocks[1]


def test_an_slo_that_no_rate_meets_says_so_and_shows_how_long_gaps_are() -> None:
    task = replace(CHAT, criterion=Criterion(1.0), workload=RequestSource("chat", 8))
    found = find(task)
    assert found.qps is None
    row = row_of([task], [found])
    assert row["capacity_qps"] is None
    assert row["ci_qps"] is None
    assert row["gap_ms"]["p99"] > 1.0  # a decode alone


def test_seeds_of_a_trace_are_its_pieces_one_after_the_other() -> None:
    trace = tuple(SimulatedRequest(float(i), i + 1, 1) for i in range(25))
    workload = RequestSource("t", 10, trace=trace)
    firsts = [workload.at(1.0, seed)[0].prompt_tokens for seed in range(3)]
    assert firsts[:2] == [1, 11]
    assert (
        len({r.prompt_tokens for r in workload.at(1.0, 2)} & {r.prompt_tokens for r in workload.at(1.0, 1)})
        < 10
    )
    assert [r.arrival_s for r in workload.at(2.0, 0)] == pytest.approx([0.5 * i for i in range(10)])
    short = RequestSource("t", 100, trace=trace)
    assert len(short.at(1.0, 0)) == len(short.at(1.0, 5)) == 25


# --- Rows ---

FIELDS = {
    "deployment",
    "workload",
    "tbt_slo_ms",
    "scheduler",
    "token_budget",
    "capacity_qps",
    "ci_qps",
    "gap_ms",
    "ttft_ms",
    "goodput_qps",
    "source",
    "disturbance",
}


def test_a_row_has_the_published_fields() -> None:
    tasks = [replace(CHAT, seed=seed) for seed in range(3)]
    figures = {"gap_ms": {"p99": 90.0}, "ttft_ms": {"p50": 300.0}}
    row = row_of(
        tasks, [Found(2.0, figures), Found(2.2, {}), Found(2.4, {})], [Found(1.0), Found(1.0), Found(1.3)]
    )
    assert set(row) == FIELDS
    assert (row["scheduler"], row["token_budget"]) == ("sarathi", 512)
    assert row["capacity_qps"] == pytest.approx(2.2)
    assert row["goodput_qps"] == pytest.approx(1.1)
    assert row["gap_ms"] == {"p99": 90.0}
    assert row_of(tasks, [Found(2.0), Found(None), Found(2.4)])["capacity_qps"] is None


def test_the_confidence_range_is_students() -> None:
    low, high = confidence_range([2.0, 2.2, 2.4])
    half = 4.303 * 0.2 / math.sqrt(3)
    assert [low, high] == pytest.approx([2.2 - half, 2.2 + half])
    assert confidence_range([2.0]) == (2.0, 2.0 * (1 + TOLERANCE))
    assert confidence_range([0.1, 5.0])[0] == 0.0


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: capacity.check_search(1, 1, Criterion()), "--requests 1"),
        (lambda: capacity.check_search(9, 0, Criterion()), "--seeds 0"),
        (lambda: capacity.check_search(9, 1, Criterion(0.0)), "--tbt-slo-ms 0.0"),
        (lambda: capacity.check_search(9, 1, Criterion(max_delay_s=float("nan"))), "--max-delay-s nan"),
        (lambda: capacity.check_search(9, 1, Criterion(percentile=0.0)), "--percentile 0.0"),
    ],
)
def test_values_out_of_range(check: Callable[[], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check()
