"""In what order prompts are read that come during the same step."""

from typing import Any

import pytest

from tests.engine.modelled import ModelledEngine
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.policies.slo import SHORTEST_FIRST_OF


def queue_of(
    make_config: Any, lengths: list[int], earlier: tuple[int, ...] = (), **settings: Any
) -> list[int]:
    """Return the lengths of the prompts that wait, in their order, after a step in which `lengths` came.

    Args:
        earlier: prompts that came before another step.
        settings: of SarathiConfig.
    """
    engine_args = {"scheduling_policy": settings.pop("scheduling_policy", "fcfs")}
    config = make_config(SarathiConfig(**settings), max_num_seqs=1, **engine_args)
    engine = ModelledEngine(config, num_blocks=400)
    engine.add("runs", 4, max_tokens=40)
    engine.step()
    for group in (earlier, lengths):
        for number, tokens in enumerate(group):
            engine.add(f"{len(group)}-{number}", tokens)
        engine.step()
    return [request.num_tokens for request in engine.scheduler.waiting]


def test_prompts_that_come_during_one_step_are_read_shortest_first(make_config: Any) -> None:
    assert queue_of(make_config, [50, 90, 10, 30], tbt_slo_ms=50) == [10, 30, 50, 90]


def test_nobody_passes_a_prompt_that_came_before_a_step(make_config: Any) -> None:
    assert queue_of(make_config, [50, 10], earlier=(100, 20, 80), tbt_slo_ms=50) == [20, 80, 100, 10, 50]


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 64},
        {"scheduler": "hybrid-only"},
        {"tbt_slo_ms": 50, "scheduling_policy": "priority"},
    ],
    ids=["fixed", "baseline", "priority"],
)
def test_other_orders_stay_as_they_are(make_config: Any, settings: dict[str, Any]) -> None:
    assert queue_of(make_config, [50, 90, 10], **settings) == [50, 90, 10]


def test_a_batch_job_keeps_its_order(make_config: Any) -> None:
    lengths = [30 + (7 * i) % 50 for i in range(SHORTEST_FIRST_OF["fcfs"] + 1)]
    assert queue_of(make_config, lengths, tbt_slo_ms=50) == lengths


def test_a_step_without_prefill_gives_a_prompt_no_token_that_a_decode_left(
    make_config: Any, monkeypatch: Any
) -> None:
    """With two batches in flight a decode is still counted when its last token is on its way."""
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=50), "async"), num_blocks=400, in_flight=2)
    for number in range(6):
        engine.add(f"r{number}", 4, max_tokens=6 + 3 * number)
    for _ in range(3):
        engine.step()
    engine.add("long", 240)
    monkeypatch.setattr(engine.scheduler.controller.policy, "_prefill_tokens", lambda *_: (0, "full"))
    while len(engine.finished) < 5:
        assert "long" not in engine.step().scheduled
    assert [request.request_id for request in engine.scheduler.running] == ["r5"]
