"""A fleet: one replica is the single simulator to the bit, and what routers, links, failures and additions do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.fleet.fleet import Change, Fleet, FleetSpec, Link, Result
from vllm_sarathi.simulation.fleet.group import Here, ReplicaSpec
from vllm_sarathi.simulation.fleet.replica import Answer, Carried, Role
from vllm_sarathi.simulation.fleet.routers import ROUTERS, router
from vllm_sarathi.simulation.fleet.tally import merged, tally
from vllm_sarathi.simulation.outcome import outcome_of
from vllm_sarathi.simulation.simulator import RequestLog, Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

PLACE = "mistral-7b/a100"
SETTINGS = (("tbt_slo_ms", 60.0),)
SERVING = ReplicaSpec(PLACE, "sarathi", SETTINGS)
KV_TOKENS = 100_000


def fleet_of(count: int, router_name: str = "round-robin", **changes: Any) -> FleetSpec:
    return replace(FleetSpec(("serve",) * count, {"serve": SERVING}, router_name, KV_TOKENS), **changes)


def split(link: Link, reading: int = 1, generating: int = 1, **changes: Any) -> FleetSpec:
    specs = {"prefill": SERVING, "decode": SERVING}
    roles = ("prefill",) * reading + ("decode",) * generating
    return replace(FleetSpec(roles, specs, "least-tokens", KV_TOKENS, link), **changes)


def run(
    spec: FleetSpec, requests: Sequence[SimulatedRequest], lines: int = 1
) -> tuple[Result, list[dict[int, RequestLog]]]:
    """Return what a fleet came to, and the logs of each of its replicas."""
    here = [Here() for _ in range(lines)]
    result = Fleet(spec, here).run(requests)
    return result, [here[i % lines].group.logs(i) for i in range(len(result.roles))]


def all_logs(logs: Sequence[dict[int, RequestLog]]) -> dict[int, RequestLog]:
    return {number: log for mine in logs for number, log in mine.items()}


def alone(
    requests: Sequence[SimulatedRequest], share_prefixes: bool = False, scheduler: str = "sarathi"
) -> list[RequestLog]:
    place = deployment(PLACE)
    settings = dict(SETTINGS) if scheduler == "sarathi" else {}
    engine = Simulator(
        build(place, scheduler_choice(scheduler, **settings), share_prefixes),
        place.times(),
        requests,
        place.in_flight,
    )
    engine.run()
    return engine.logs


def seen(log: RequestLog) -> tuple[Any, ...]:
    return log.request, log.scheduled_s, log.token_s, log.finished, log.refused


CHAT = [replace(r, ttft_slo_ms=2000.0, tbt_slo_ms=60.0) for r in synthetic("chat", 2.0, 32, seed=1)]


@pytest.mark.parametrize("name", ROUTERS)
def test_one_replica_is_the_single_simulator_to_the_bit(name: str) -> None:
    single = alone(CHAT)
    result, [logs] = run(fleet_of(1, name), CHAT)
    assert [seen(logs[number]) for number in range(len(CHAT))] == [seen(log) for log in single]
    [ended] = result.ended
    said, whole = merged(ended.by_kind.values()).to_mapping(), outcome_of(single).to_mapping()
    assert {key: said[key] for key in whole} == whole


def test_figures_are_the_same_in_whichever_order_they_are_summed() -> None:
    single = alone(synthetic("classes", 2.0, 60, seed=3))
    whole = outcome_of(single).to_mapping()
    for parts in (2, 3, 5, 7):
        said = merged(tally(single[part::parts]) for part in range(parts)).to_mapping()
        assert {key: said[key] for key in whole} == whole


@pytest.mark.parametrize("scheduler", ["default", "sarathi@512"])
def test_so_it_is_with_shared_prefixes_and_other_schedulers(scheduler: str) -> None:
    requests = synthetic("mooncake", 1.0, 40, seed=2)
    settings = () if scheduler == "default" else (("token_budget", 512),)
    spec = ReplicaSpec(PLACE, scheduler, settings, share_prefixes=True)
    _, [logs] = run(fleet_of(1, "prefix-affinity", specs={"serve": spec}), requests)
    single = alone(requests, share_prefixes=True, scheduler=scheduler)
    assert [seen(logs[number]) for number in range(len(requests))] == [seen(log) for log in single]


@pytest.mark.parametrize("name", ["round-robin", "first-token"])
def test_the_groups_do_not_change_the_answer(name: str) -> None:
    _, one = run(fleet_of(3, name), CHAT)
    _, three = run(fleet_of(3, name), CHAT, lines=3)
    assert [{n: seen(log) for n, log in logs.items()} for logs in one] == [
        {n: seen(log) for n, log in logs.items()} for logs in three
    ]


def test_round_robin_takes_turns() -> None:
    _, logs = run(fleet_of(3), CHAT)
    assert [sorted(mine) for mine in logs] == [list(range(i, len(CHAT), 3)) for i in range(3)]


def test_a_router_that_looks_balances_what_waits() -> None:
    lengths = [(8000, 20), (200, 20)] * 20
    requests = [SimulatedRequest(0.2 * i, prompt, out) for i, (prompt, out) in enumerate(lengths)]
    blind, blind_logs = run(fleet_of(2), requests)
    looking, looking_logs = run(fleet_of(2, "least-tokens"), requests)

    def worst_s(logs: list[dict[int, RequestLog]]) -> float:
        return max(log.token_s[0] - log.request.arrival_s for log in all_logs(logs).values())

    assert worst_s(looking_logs) < 0.7 * worst_s(blind_logs)
    assert sum(each.requests for e in looking.ended for each in e.by_kind.values()) == len(requests)
    assert len(blind.ended) == 2


@pytest.mark.parametrize("name", ["least-tokens", "prefix-affinity", "first-token"])
def test_of_equals_the_one_that_was_chosen_longest_ago_is_next(name: str) -> None:
    choosing, request = router(name, KV_TOKENS), SimulatedRequest(0.0, 100, 10)
    chosen: list[int] = []
    for _ in range(8):
        reading = chosen[-2:]  # are busy with their prompts: the number of equals changes
        answers = [Answer(i, 100 * (i in reading), 0.1 * (i in reading), True) for i in range(8)]
        chosen.append(choosing.choose(request, answers))
    assert chosen == list(range(8))
    # It is so of those that are left, too.
    assert [choosing.choose(request, [Answer(i, 0, 0.0, True) for i in (3, 5, 7)]) for _ in range(3)] == [
        0,
        1,
        2,
    ]


def test_a_router_that_asks_has_the_answer_of_a_live_engine() -> None:
    """Where two replicas wait alike, the one with more decodes beside its prompts is the slower."""
    answers = [Answer(0, 500, 0.9, False), Answer(1, 900, 0.4, True), Answer(2, 100, 0.5, True)]
    request = SimulatedRequest(0.0, 100, 10)
    assert router("first-token", KV_TOKENS).choose(request, answers) == 1
    asked = router("first-token", KV_TOKENS)
    assert asked.choose(request, [Answer(0, 10, None, None), Answer(1, 0, 0.1, True)]) == 1
    assert asked.choose(request, [Answer(0, 0, None, None), Answer(1, 0, 0.1, True)]) == 0
    late = [replace(r, ttft_slo_ms=1.0) for r in CHAT]
    result, _ = run(fleet_of(2, "first-token"), late)
    assert result.unkept > 0.5 * len(CHAT)
    result, _ = run(fleet_of(2, "first-token"), [replace(r, ttft_slo_ms=1e6) for r in CHAT])
    assert result.unkept == 0


def test_prefix_affinity_finds_what_is_cached() -> None:
    requests = synthetic("mooncake", 2.0, 80, seed=3)
    spec = {"serve": replace(SERVING, share_prefixes=True)}
    _, spread = run(fleet_of(4, "least-tokens", specs=spec), requests)
    _, bound = run(fleet_of(4, "prefix-affinity", specs=spec), requests)

    def mean_s(logs: list[dict[int, RequestLog]]) -> float:
        return float(np.mean([log.token_s[0] - log.request.arrival_s for log in all_logs(logs).values()]))

    assert mean_s(bound) < 0.95 * mean_s(spread)


def test_prefix_affinity_forgets_what_no_cache_could_hold() -> None:
    choosing = router("prefix-affinity", 2 * 512)
    answers = [Answer(0, 0), Answer(1, 0)]
    shared = SimulatedRequest(0.0, 1536, 10, prefix=(1, 2))
    first = choosing.choose(shared, answers)
    assert choosing.choose(shared, answers) == first
    for other in ((3, 4), (5, 6), (7, 8)):
        choosing.choose(SimulatedRequest(0.0, 1536, 10, prefix=other), answers)
    assert choosing.choose(shared, [answers[first]._replace(waiting_tokens=1), answers[1 - first]]) == 1


def test_what_a_failed_replica_had_is_read_again_elsewhere() -> None:
    at_s = CHAT[20].arrival_s + 0.01
    result, logs = run(fleet_of(2, changes=(Change(at_s, fails=0),)), CHAT)
    assert result.rerouted > 0
    everything = all_logs(logs)
    assert sorted(everything) == list(range(len(CHAT)))
    assert all(len(log.token_s) == log.request.output_tokens and log.finished for log in everything.values())
    assert all(log.token_s[-1] <= at_s for log in logs[0].values())
    moved = [log for log in logs[1].values() if log.token_s[0] < at_s < log.token_s[-1]]
    restarted = [log for log in moved if max(np.diff(log.token_s)) > 0.15]
    assert restarted, "reading prompt and answer again takes its time"
    assert all(list(log.token_s) == sorted(log.token_s) for log in everything.values())


def test_a_step_that_a_failure_cuts_off_has_told_nothing() -> None:
    replica = SERVING.build(0, "serve")
    replica.send(Carried(0, SimulatedRequest(0.0, 100, 20)), 0.0)
    replica.advance(0.1)
    tokens = list(replica.logs[0].token_s)
    [unfinished] = replica.fail(tokens[-1] - 1e-6)
    assert list(unfinished.token_s) == tokens[:-1]
    assert unfinished.asked_at(1.0).prompt_tokens == 100 + len(tokens) - 1
    assert replica.logs == []


def test_or_it_is_lost_as_stated() -> None:
    at_s = CHAT[20].arrival_s + 0.01
    result, logs = run(fleet_of(2, changes=(Change(at_s, fails=0),), reroute=False), CHAT)
    lost = merged(result.unserved.values())
    assert lost.requests > 0
    assert (lost.completed, result.rerouted) == (0, 0)
    assert lost.requests + len(all_logs(logs)) == len(CHAT)
    # With nobody left, all that come later are lost, too.
    result, logs = run(fleet_of(1, changes=(Change(at_s, fails=0),)), CHAT)
    assert merged(result.unserved.values()).requests + len(all_logs(logs)) == len(CHAT)
    assert len(all_logs(logs)) <= 21


def test_an_added_replica_takes_its_share() -> None:
    at_s = CHAT[16].arrival_s
    result, logs = run(fleet_of(1, "least-tokens", changes=(Change(at_s, role="serve"),)), CHAT)
    assert result.roles == ["serve", "serve"]
    assert min(logs[1]) >= 16
    assert len(logs[1]) > 5


FAST, SLOW = Link(50e9, 0.0, 131072.0), Link(0.5e9, 0.0, 131072.0)


def test_prefill_on_another_replica() -> None:
    """Gaps beside nothing that is read are those of decodes alone; a first token waits for its KV to come."""
    _, together = run(fleet_of(1), CHAT)
    result, logs = run(split(FAST), CHAT)
    assert result.roles == ["prefill", "decode"]
    assert sorted(logs[0]) == sorted(logs[1]) == list(range(len(CHAT)))
    assert all(len(log.token_s) == 1 for log in logs[0].values())
    assert all(len(log.token_s) == log.request.output_tokens for log in logs[1].values())
    longest = [
        max(np.concatenate([np.diff(log.token_s) for log in mine.values()]))
        for mine in (together[0], logs[1])
    ]
    assert longest[1] < 0.6 * longest[0]
    for number, log in logs[1].items():
        assert log.request.arrival_s == CHAT[number].arrival_s
        sent_s = FAST.send_s(log.request.prompt_tokens)
        assert log.token_s[0] > logs[0][number].token_s[0] + sent_s
        assert log.scheduled_s == logs[0][number].scheduled_s


def test_the_fast_path_changes_nothing_beside_a_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    _, quick = run(split(FAST), CHAT)
    build_replica = ReplicaSpec.build

    def plain(spec: ReplicaSpec, index: int, role: Role) -> Any:
        made = build_replica(spec, index, role)
        made.scheduler._has_express = False
        return made

    monkeypatch.setattr(ReplicaSpec, "build", plain)
    _, slow = run(split(FAST), CHAT)
    assert [{n: seen(log) for n, log in logs.items()} for logs in quick] == [
        {n: seen(log) for n, log in logs.items()} for logs in slow
    ]


def test_replicas_that_generate_share_what_is_held() -> None:
    lengths = [(6000, 200), (100, 200)] * 8
    requests = [SimulatedRequest(0.3 * i, prompt, out) for i, (prompt, out) in enumerate(lengths)]
    _, logs = run(split(FAST, 1, 2), requests)
    held = [sum(log.request.prompt_tokens for log in mine.values()) for mine in logs[1:]]
    assert max(held) < 0.7 * sum(held)


def test_a_slow_link_shows_in_the_first_tokens() -> None:
    requests = [SimulatedRequest(20.0 * i, 4000, 10) for i in range(4)]
    fast, slow = (all_logs(run(split(link), requests)[1][1:]) for link in (FAST, SLOW))
    for number in range(4):
        later_s = slow[number].token_s[0] - fast[number].token_s[0]
        assert later_s == pytest.approx(SLOW.send_s(4000) - FAST.send_s(4000), abs=0.01)
    # Transfers of one replica take turns.
    at_once = [replace(request, arrival_s=0.0) for request in requests]
    first_s = sorted(log.token_s[0] for log in all_logs(run(split(SLOW), at_once)[1][1:]).values())
    assert np.diff(first_s) == pytest.approx([SLOW.send_s(4000)] * 3, abs=0.05)


def test_kv_that_comes_while_a_replica_decodes_quietly_is_seen() -> None:
    """One with two batches in flight lost it: the connector came after a step that had been scheduled without one."""
    replica = SERVING.build(0, "decode")
    replica.send(Carried(0, SimulatedRequest(0.0, 100, 200)), 0.0)
    replica.send(Carried(1, SimulatedRequest(0.0, 100, 200)), 0.0)
    replica.advance(1.0)
    replica.send(Carried(2, SimulatedRequest(1.0, 100, 20), kv_s=1.0), 1.0)
    replica.drain()
    assert [len(log.token_s) for log in replica.logs] == [200, 200, 20]


@pytest.mark.parametrize("fails", [0, 2])
def test_replicas_of_either_kind_fail(fails: int) -> None:
    at_s = CHAT[20].arrival_s + 0.01
    spec = split(FAST, 2, 2, changes=(Change(at_s, fails=fails),), router="first-token")
    result, logs = run(spec, CHAT)
    answered = all_logs(logs[2:])
    assert sorted(answered) == list(range(len(CHAT)))
    assert all(len(log.token_s) == log.request.output_tokens for log in answered.values())
    assert all(log.token_s[-1] <= at_s for log in logs[fails].values())
    assert all(list(log.token_s) == sorted(log.token_s) for log in answered.values())
    assert result.rerouted > 0 or fails == 0


def test_a_view_that_is_refreshed_seldom_counts_what_was_sent_since() -> None:
    requests = [SimulatedRequest(0.001 * i, 1000 if i else 8000, 5) for i in range(9)]
    _, logs = run(fleet_of(2, "least-tokens", refresh_s=1e9), requests)
    assert [len(mine) for mine in logs] == [1, 8]


def test_tallies_add_up_to_numpys_percentiles() -> None:
    rng = np.random.default_rng(0)
    logs = [
        RequestLog(
            SimulatedRequest(0.0, 10, 40), 0.0, list(np.cumsum(rng.choice([0.01, 0.02, 0.05], 40))), True
        )
        for _ in range(7)
    ]
    parts = merged([tally(logs[:3]), tally(logs[3:4]), tally(logs[4:])])
    gaps = np.concatenate([np.diff(log.token_s) for log in logs])
    for percent in np.linspace(0, 100, 3 * (len(gaps) - 1) + 1):
        assert parts.gap_percentile_s(percent) == np.percentile(gaps, percent)
    assert parts.attainment(30.0) == pytest.approx((gaps <= 0.03).mean())
    assert merged([]).gap_percentile_s(50) is None


def test_an_unknown_router_is_named() -> None:
    with pytest.raises(ConfigError, match="--router 'least-token': unknown; did you mean 'least-tokens'"):
        router("least-token", 1)
