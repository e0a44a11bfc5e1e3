"""Settings that change while the controller works: the new SLO holds from the next step on, nothing is unlearnt."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.core.devices import Loop, roofline
from vllm_sarathi.core.config import SCHEDULERS, SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.types import Pipeline, StepRecord


@pytest.mark.parametrize("stages", [1, 2])
def test_the_same_settings_anew_change_nothing(stages: int) -> None:
    loops = []
    for again in (False, True):
        controller = StepController(SarathiConfig(tbt_slo_ms=100), Pipeline(stages))
        controller.observe = noting_starts(controller.observe)  # type: ignore[method-assign, assignment]
        loop = Loop(controller, roofline(), noise=0.02)
        loop.run(200)
        if again:
            controller.reconfigure(SarathiConfig(tbt_slo_ms=100))
        loop.run(100)
        loops.append(loop)
    assert loops[0].budgets == loops[1].budgets
    assert loops[0].controller.model.coefficients == loops[1].controller.model.coefficients


def noting_starts(observe: Callable[[StepRecord], None]) -> Callable[[StepRecord], None]:
    """Return `observe` for steps of a pipeline in which each starts before the one ahead of it has ended."""
    return lambda record: observe(replace(record, started_s=record.completed_s - 2.5 * record.measured_s))


def settled(config: SarathiConfig) -> Loop:
    loop = Loop(StepController(config), roofline())
    for _ in range(300):
        loop.step()
    return loop


def test_another_slo_is_kept_at_once_and_nothing_is_learnt_again() -> None:
    loop = settled(SarathiConfig(tbt_slo_ms=100))
    controller, steps = loop.controller, loop.controller.model.steps
    model = controller.model
    assert max(loop.times_s[-50:]) <= 0.1
    controller.reconfigure(SarathiConfig(tbt_slo_ms=300))
    loop.step()
    assert controller.model is model
    assert model.steps == steps + 1
    assert controller.tbt_slo_s == 0.3
    for _ in range(20):  # what was never seen is approached, not leapt to
        loop.step()
    assert 0.2 < loop.times_s[-1] <= 0.3
    controller.reconfigure(SarathiConfig(tbt_slo_ms=60))
    for _ in range(20):
        loop.step()
    assert max(loop.times_s[-20:]) <= 0.06


def test_an_slo_as_a_multiple_goes_on() -> None:
    loop = settled(SarathiConfig(tbt_slo_ms=100))
    loop.controller.reconfigure(SarathiConfig(tbt_slo="auto:10x"))
    for _ in range(100):
        loop.step()
    alone_s = loop.controller.policy.decode_step_s
    assert loop.controller.tbt_slo_s == pytest.approx(10 * alone_s, rel=0.1)


def test_what_was_seen_of_the_device_and_of_answers_goes_over() -> None:
    loop = settled(SarathiConfig(tbt_slo_ms=100))
    controller = loop.controller
    for i in range(20):
        controller.arrived(str(i), 100)
        controller.ended(str(i), 50, 10 + i)
    controller.arrived("running", 64)
    old: Any = controller.policy
    controller.reconfigure(SarathiConfig(tbt_slo_ms=200, prefill_max_wait_s=5))
    new: Any = controller.policy
    assert new is not old
    assert new.experience.most_tokens == old.experience.most_tokens > 0
    assert new.experience.hybrid_steps == old.experience.hybrid_steps
    assert new.answers.mean_tokens == old.answers.mean_tokens
    assert new.deadlines.last_delivery_s(math.inf) == old.deadlines.last_delivery_s(math.inf) > 0
    controller.ended("running", 50, 64)
    assert new.answers.mean_tokens != 0


@pytest.mark.parametrize("pipeline", [Pipeline(1), Pipeline(2)])
def test_every_policy_goes_over_into_every_other(pipeline: Pipeline) -> None:
    loop = Loop(StepController(SarathiConfig(tbt_slo_ms=100), pipeline), roofline())
    for name in (*SCHEDULERS, *reversed(SCHEDULERS)):
        loop.controller.reconfigure(SarathiConfig(scheduler=name))
        for _ in range(5):
            loop.step()
        assert loop.controller.config.scheduler == name
    loop.controller.reconfigure(SarathiConfig(token_budget=48))
    loop.step()
    assert loop.budgets[-1] == 48
