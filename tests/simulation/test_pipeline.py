"""What a pipeline does to the SLO, in simulation: the two stages of LLaMA2-70B on A40, as in the paper."""

from typing import Any

import numpy as np
import pytest

from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.outcome import Outcome, outcome_of
from vllm_sarathi.simulation.simulator import Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic

SLO_S = 1.0


@pytest.fixture(scope="module")
def played() -> tuple[Any, Outcome]:
    """A load near saturation, of prompts that take a good part of the SLO each."""
    place = deployment("llama2-70b/8xa40")
    scheduler = build(place, scheduler_choice("sarathi", tbt_slo_ms=SLO_S * 1e3))
    simulator = Simulator(scheduler, place.times(0), synthetic("arxiv", 0.34, 96, 0), place.in_flight)
    simulator.run()
    return scheduler, outcome_of(simulator.logs)


def test_the_slo_is_kept_and_made_use_of(played: tuple[Any, Outcome]) -> None:
    _, outcome = played
    assert 0.9 * SLO_S < np.percentile(outcome.gaps_s, 99) <= SLO_S
    assert np.mean(outcome.gaps_s > SLO_S) <= 0.002


def test_the_device_is_known_in_spite_of_the_bubbles(played: tuple[Any, Outcome]) -> None:
    scheduler, _ = played
    model = scheduler.controller.model
    assert model._margin._covering < 1.05  # without the caution after the last prompts
    assert model.relative_error < 0.03
