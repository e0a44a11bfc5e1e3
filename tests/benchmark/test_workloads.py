"""The workloads: drawn from a seed, with the lengths and the arrivals that they state."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from vllm_sarathi.benchmark.live.arrivals import draw_arrivals, quick, trace_lines
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.workloads.live import LIVE_WORKLOADS, LiveWorkload
from vllm_sarathi.simulation.workloads.registry import live_named, synthetic

each_workload = pytest.mark.parametrize(
    "workload", LIVE_WORKLOADS, ids=[workload.name for workload in LIVE_WORKLOADS]
)


@each_workload
def test_lengths_are_seeded_and_within_their_ranges(workload: LiveWorkload) -> None:
    arrivals = draw_arrivals(workload, seed=0)
    assert arrivals == draw_arrivals(workload, seed=0)
    assert arrivals != draw_arrivals(workload, seed=1)
    assert len(arrivals) == workload.requests
    counts = [
        sum(
            kind.prompt_tokens[0] <= each.prompt_tokens <= kind.prompt_tokens[1]
            and kind.output_tokens[0] <= each.output_tokens <= kind.output_tokens[1]
            for each in arrivals
        )
        for kind in workload.kinds
    ]
    assert sum(counts) == workload.requests
    for kind, count in zip(workload.kinds, counts, strict=True):
        assert count == pytest.approx(kind.share * workload.requests, abs=0.5)


def test_the_mix_is_15_percent_very_long_prompts_also_when_it_is_quick() -> None:
    for workload in (live_named("mix"), quick(live_named("mix"))):
        very_long = sum(each.prompt_tokens >= 2000 for each in draw_arrivals(workload, 0))
        assert very_long == round(0.15 * workload.requests)
        at = [i for i, each in enumerate(draw_arrivals(workload, 0)) if each.prompt_tokens >= 2000]
        assert at[0] < workload.requests / 2 < at[-1]  # among the others


@each_workload
def test_every_request_fits_into_the_servers_context(workload: LiveWorkload) -> None:
    assert all(kind.prompt_tokens[1] + kind.output_tokens[1] <= 4096 for kind in workload.kinds)


@each_workload
def test_requests_arrive_in_order_at_about_the_stated_rate(workload: LiveWorkload) -> None:
    times_s = [each.at_s for each in draw_arrivals(workload, 0)]
    assert times_s[0] == 0
    assert all(earlier <= later for earlier, later in pairwise(times_s))
    assert times_s[-1] == pytest.approx(workload.requests / workload.rate_per_s, rel=0.4)


def test_a_burst_is_sixteen_at_once() -> None:
    times_s = Counter(each.at_s for each in draw_arrivals(live_named("burst"), 0))
    assert set(times_s.values()) == {16}
    assert len(times_s) == 5


def test_the_trace_states_every_request_and_no_two_prompts_are_alike() -> None:
    arrivals = draw_arrivals(live_named("short"), 0)
    rows = [json.loads(line) for line in trace_lines(arrivals).splitlines()]
    assert [row["timestamp"] for row in rows] == [each.at_s for each in arrivals]
    assert [row["input_length"] for row in rows] == [each.prompt_tokens for each in arrivals]
    assert [row["output_length"] for row in rows] == [each.output_tokens for each in arrivals]
    assert len({tuple(row["hash_ids"]) for row in rows}) == len(rows)


@each_workload
def test_a_live_workload_can_be_simulated_at_any_rate(workload: LiveWorkload) -> None:
    requests = synthetic(workload.name, 50.0, 40, seed=1)
    kinds = [
        kind
        for kind in workload.kinds
        for request in requests
        if kind.prompt_tokens[0] <= request.prompt_tokens <= kind.prompt_tokens[1]
        and kind.output_tokens[0] <= request.output_tokens <= kind.output_tokens[1]
    ]
    assert len(kinds) == 40
    assert requests[-1].arrival_s == pytest.approx(0.8, rel=0.5)


def test_a_workload_without_a_rate_is_for_simulations_only() -> None:
    with pytest.raises(
        ConfigError, match=r"'chat': can only be simulated; a live run takes short, long, .*, idle"
    ):
        live_named("chat", others=("idle",))
