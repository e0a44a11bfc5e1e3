"""Captured sizes against vLLM's own, and closed loops."""

import pytest

from vllm_sarathi.simulation.closed_loop import ClosedLoop, Frontend
from vllm_sarathi.simulation.deployment import SchedulerChoice, build
from vllm_sarathi.simulation.devices.corrections import family
from vllm_sarathi.simulation.devices.graphs import capture_limit, captured_sizes, padded
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

from .places import EvenTimes, small_place


def test_sizes_are_those_of_the_document_in_vllm() -> None:
    sizes = captured_sizes(1024, capture_limit("h100"))
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert sizes[-3:] == (480, 496, 512)
    assert {248, 256, 272} <= set(sizes)
    assert 264 not in sizes
    assert captured_sizes(8)[-1] == 16
    assert captured_sizes(1024, capture_limit("b200"))[-1] == 1024


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 1), (3, 4), (9, 16), (250, 256), (257, 272), (512, 512), (513, 513)]
)
def test_a_step_runs_in_the_next_size(tokens: int, size: int) -> None:
    assert padded(tokens, captured_sizes(1024)) == size


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("context_moe", "moe"),
        ("generation_full_moe_overlap", "moe"),
        ("context_moe_pre_dispatch", "communication"),
        ("generation_ar_1", "communication"),
        ("context_tp_allreduce", "communication"),
        ("generation_router_gemm", "gemm"),
        ("context_gdn_scan", "state"),
        ("context_add_norm_1", "elementwise"),
        ("context_embedding_ar", "communication"),
        ("generation_moe_norm", "elementwise"),
    ],
)
def test_operators_have_their_family(name: str, kind: str) -> None:
    assert family(name) == kind


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_client_sends_when_it_has_been_answered(in_flight: int) -> None:
    where = small_place()
    requests = [SimulatedRequest(0.0, 100, 5 + i % 3) for i in range(20)]
    scheduler = build(where, SchedulerChoice("default", None), in_flight=in_flight)
    loop = ClosedLoop(scheduler, EvenTimes(), requests, 4, Frontend(0.25, 0.0001), in_flight)
    most = 0
    while loop.step():
        most = max(most, len(loop.scheduler.requests))
    assert most == 4
    assert len(loop.finished) == 20
    ends = sorted(log.token_s[-1] for log in loop.logs)
    assert loop.sent_s == [0.0] * 4 + ends[:16]
    # A tokenizer reads one prompt after the other, 10 ms each.
    arrivals = [log.request.arrival_s for log in loop.logs]
    assert arrivals[:4] == pytest.approx([0.26, 0.27, 0.28, 0.29])
    for before, arrival, sent_s in zip(arrivals, arrivals[1:], loop.sent_s[1:], strict=False):
        assert arrival == pytest.approx(max(before, sent_s + 0.25) + 0.01)
    assert len(loop.answered()) == 20
