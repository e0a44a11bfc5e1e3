"""Figures: what is counted, by class, against which SLO; and how much more would fit."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from vllm_sarathi.core.figures import (
    FIGURES,
    SLO_RATIOS,
    ClassGaps,
    Figures,
    FinishedStep,
    KeptGaps,
    Kind,
    Queues,
    TokenWait,
    kept_gaps,
)
from vllm_sarathi.core.forecast import FirstTokenForecast, forecast_first_token
from vllm_sarathi.core.headroom import (
    Claim,
    claim,
    headroom_tokens_per_s,
    largest_chunk,
    mean_claim,
    prefill_tokens_per_s,
    replicas_wanted,
)
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, StepShape, chunk_work


def step(
    measured_s: float = 0.1,
    gaps: Sequence[ClassGaps] = (ClassGaps("default", 8, 0.1),),
    first_tokens: Sequence[TokenWait] = (),
    chunk: int = 32,
    predicted_s: float | None = 0.08,
) -> FinishedStep:
    shape = StepShape(8 + chunk, 8, 4000, chunk_work(0, chunk), 8 + (chunk > 0))
    traced = TracedStep(1.0, shape, 48, "slo", predicted_s, measured_s, 0.1, 9, 3)
    return FinishedStep(traced, tuple(gaps), tuple(first_tokens))


def buckets(figures: Figures, name: str, slo_class: str) -> dict[str, float]:
    return {
        dict(sample.labels)["le"]: sample.value
        for sample in figures.samples()
        if sample.figure.name == name
        and sample.suffix == "_bucket"
        and dict(sample.labels).get("slo_class", "") == slo_class
    }


def test_each_class_is_judged_by_its_own_slo() -> None:
    figures = Figures()
    gaps = (ClassGaps("interactive", 3, 0.05), ClassGaps("batch", 5, 0.5), ClassGaps("free", 2, None))
    figures.take([step(0.1, gaps), step(0.05, gaps)])
    assert figures.counters["gaps", "interactive"] == 6
    assert figures.counters["gaps_kept", "interactive"] == 3  # exactly in time is in time
    assert figures.counters["gaps", "batch"] == figures.counters["gaps_kept", "batch"] == 10
    assert ("gaps", "free") not in figures.counters
    assert buckets(figures, "time_between_tokens_slo_ratio", "interactive")["1.0"] == 3
    assert buckets(figures, "time_between_tokens_slo_ratio", "interactive")["2.0"] == 3


def test_what_the_buckets_up_to_the_slo_hold_is_what_was_kept() -> None:
    figures, random = Figures(), np.random.default_rng(0)
    for _ in range(50):
        figures.take([step(float(s)) for s in random.lognormal(-2.3, 0.5, 20)])
    held = buckets(figures, "time_between_tokens_slo_ratio", "default")
    kept = sum(count for bound, count in held.items() if float(bound) <= 1.0)
    assert kept == figures.counters["gaps_kept", "default"]
    assert sum(held.values()) == figures.counters["gaps", "default"] == 8000
    assert 1.0 in SLO_RATIOS


def test_first_tokens_without_an_slo_are_not_judged() -> None:
    figures = Figures()
    figures.take([step(first_tokens=[TokenWait("a", 2.0, 1.0), TokenWait("a", 2.0, None)])])
    assert figures.counters["first_tokens", "a"] == 1
    assert figures.counters["first_tokens_kept", "a"] == 0


def test_a_wait_across_a_preemption_is_a_gap_of_its_class() -> None:
    figures, pipeline = Figures(), Pipeline(3)
    of_step = (ClassGaps("a", 8, pipeline.step_s(0.1)),)
    resumed = (TokenWait("a", 2.0, 0.1), TokenWait("b", 0.2, 0.3), TokenWait("c", 9.0, None))
    both = FinishedStep(step(0.03).traced, of_step, resumed=resumed)
    figures.take([both])
    assert (figures.counters["gaps", "a"], figures.counters["gaps_kept", "a"]) == (9, 8)
    assert (figures.counters["gaps", "b"], figures.counters["gaps_kept", "b"]) == (1, 1)
    assert ("gaps", "c") not in figures.counters
    assert buckets(figures, "time_between_tokens_slo_ratio", "a")["+Inf"] == 1
    assert [replace(each, slo_s=round(each.slo_s or 0.0, 9)) for each in kept_gaps([both], pipeline)] == [
        KeptGaps("a", 0.1, 9, 8),
        KeptGaps("b", 0.3, 1, 1),
    ]


def test_predictions_are_of_steps_that_hold_both() -> None:
    figures = Figures()
    figures.take([step(0.1), step(0.1, chunk=0), step(0.1, predicted_s=None)])
    assert figures.counters["step_measured_seconds", ""] == pytest.approx(0.1)
    assert figures.counters["step_predicted_seconds", ""] == pytest.approx(0.08)
    assert figures.counters["steps", ""] == 3
    assert figures.counters["prefill_tokens", ""] == 64


def test_batch_work_is_counted_apart() -> None:
    figures = Figures(("a", "night"), {"night"})
    assert figures.counters["batch_prefill_tokens", ""] == 0
    figures.take([FinishedStep(step(chunk=32).traced, (), batch_tokens=20), step(chunk=32)])
    assert figures.counters["prefill_tokens", ""] == 64
    assert figures.counters["batch_prefill_tokens", ""] == 20
    for waiting, of_batch in (({"a": 2, "night": 3}, 3), ({"a": 1}, 0)):
        figures.look(Queues(5, waiting))
        assert figures.gauges["batch_waiting_requests", ""] == of_batch


def test_a_class_of_which_nobody_has_come_is_shown_to_wait_at_nought() -> None:
    figures = Figures(("a", "night"), {"night"})
    figures.look(Queues(1, {"a": 1}))
    assert [figures.gauges["waiting_requests", name] for name in ("a", "night")] == [1, 0]


def test_a_class_that_waits_no_longer_is_shown_at_nought() -> None:
    figures = Figures()
    figures.look(Queues(5, {"batch": 3}))
    figures.look(Queues(4, {"default": 1}))
    assert figures.gauges["waiting_requests", "batch"] == 0
    assert figures.gauges["waiting_requests", "default"] == 1
    assert figures.gauges["running_requests", ""] == 4


def test_a_gauge_of_what_is_not_known_is_not_there() -> None:
    figures = Figures()
    for value in (None, float("nan"), float("inf")):
        figures.set("tbt_slo_seconds", 1.0)
        figures.set("tbt_slo_seconds", value)
        assert ("tbt_slo_seconds", "") not in figures.gauges


def test_each_help_text_stands_alone() -> None:
    """Prometheus and dashboards show it without the one before it."""
    assert not [f.name for f in FIGURES.values() if re.search(r"\b(those|them|such)\b", f.help, re.I)]


def test_every_counter_is_there_from_the_start_and_in_base_units() -> None:
    by_class = {s.labels for s in Figures(("a", "b")).samples() if s.figure.by_class}
    assert by_class == {(("slo_class", "a"),), (("slo_class", "b"),)}
    names = {s.figure.name + s.suffix for s in Figures().samples()}
    counters = {f"{f.name}_total" for f in FIGURES.values() if f.kind is Kind.COUNTER}
    assert names == {*counters, "waiting_requests"}
    assert not [name for name in FIGURES if name.endswith(("_ms", "_total", "_milliseconds"))]


# Headroom and the first token, of a device that takes 10 ms a step, 1 ms a decode and 0.1 ms a prompt token.


def seconds(tokens: float, decodes: int) -> float:
    return 0.01 + 1e-3 * decodes + 1e-4 * (tokens - decodes)


@pytest.fixture(scope="module")
def model() -> StepTimeModel:
    taught, random = StepTimeModel(), np.random.default_rng(1)
    for _ in range(600):
        decodes, chunk = int(random.integers(0, 40)), int(random.integers(0, 1000))
        if decodes + chunk:
            shape = StepShape(decodes + chunk, decodes, 0, 0.0, decodes + (chunk > 0))
            taught.observe(shape, seconds(decodes + chunk, decodes))
    return taught


def test_the_largest_chunk_ends_in_time_and_one_token_more_does_not(model: StepTimeModel) -> None:
    for decodes in (0, 5, 20):
        chunk = largest_chunk(model, decodes, 0, 0.1, 4096)
        limit_s = 0.1 / model.margin
        for tokens, in_time in ((chunk, True), (chunk + 1, False)):
            work = chunk_work(0, tokens)
            assert (model.seconds(decodes + tokens, decodes, 0, work, decodes + 1) <= limit_s) is in_time
    assert largest_chunk(model, 20, 0, 0.001, 4096) == 0
    assert largest_chunk(model, 20, 0, 100.0, 4096) == 4096 - 20
    assert largest_chunk(model, 20, 0, 100.0, 10) == 0


def test_headroom_falls_with_decodes_and_with_what_is_read(model: StepTimeModel) -> None:
    rooms = [headroom_tokens_per_s(model, decodes, 0, 0.1, 4096, 0.0) for decodes in (0, 10, 30)]
    assert rooms[0] > rooms[1] > rooms[2] > 0
    # Of 100 ms, 10 are the step's and 30 the decodes': 600 tokens in a tenth of a second, less the margin.
    assert rooms[2] == pytest.approx(6000, rel=0.2)
    able = prefill_tokens_per_s(model, 10, 0, 0.1, 4096)
    assert headroom_tokens_per_s(model, 10, 0, 0.1, 4096, 1000.0) == pytest.approx(able - 1000.0)
    assert headroom_tokens_per_s(model, 10, 0, 0.1, 4096, able + 1) == 0
    assert headroom_tokens_per_s(model, 30, 0, 0.02, 4096, 0.0) == 0


def test_what_batch_work_takes_of_a_step_is_no_claim() -> None:
    mixed = FinishedStep(
        step(chunk=32).traced, (ClassGaps("a", 6, 0.1), ClassGaps("night", 2, None)), batch_tokens=20
    )
    assert claim(mixed, {"night"}) == Claim(6, 3000, 12)
    assert claim(mixed, ()) == Claim(8, 4000, 12)
    night = FinishedStep(step(chunk=0).traced, (ClassGaps("night", 8, None),))
    assert claim(night, {"night"}) == Claim(0, 0, 0)
    assert mean_claim([claim(mixed, {"night"}), claim(night, {"night"}), Claim(2, 1000, 5)]) == (4, 2000, 17)
    assert mean_claim([]) == Claim(0, 0, 0)


@pytest.mark.parametrize(
    ("read", "headroom", "wanted"),
    [
        ([100.0], [900.0], 1),
        ([790.0], [210.0], 1),
        ([900.0], [100.0], 2),
        ([100.0, 100.0], [900.0, 900.0], 1),
        ([500.0, 500.0, 500.0], [0.0, 0.0, 0.0], 4),
        ([500.0, 0.0], [0.0, 0.0], 2),  # one that could read nothing says nothing of the others
        ([0.0], [1000.0], 1),
        ([0.0, 0.0], [0.0, 0.0], None),
        ([], [], None),
    ],
)
def test_replicas_are_wanted_for_what_all_read_over_what_one_should(
    read: list[float], headroom: list[float], wanted: int | None
) -> None:
    assert replicas_wanted(read, headroom, full=0.8) == wanted


def forecast(
    model: StepTimeModel, tokens: int, ahead: int, decodes: int, slo_s: float | None = None
) -> FirstTokenForecast:
    return forecast_first_token(
        model,
        tokens=tokens,
        ahead_tokens=ahead,
        decodes=decodes,
        context_tokens=0,
        step_slo_s=0.1,
        most_tokens=4096,
        ttft_slo_s=slo_s,
    )


def test_the_first_token_waits_for_what_is_ahead_and_for_its_own_prompt(model: StepTimeModel) -> None:
    alone, behind = forecast(model, 600, 0, 30), forecast(model, 600, 5400, 30)
    assert alone.wait_s is not None
    assert alone.wait_s == pytest.approx(0.1, rel=0.2)
    assert behind.wait_s == pytest.approx(10 * alone.wait_s)
    assert forecast(model, 600, 0, 0).wait_s == pytest.approx(seconds(600, 0), rel=0.2)
    assert forecast(model, 600, 0, 30, 0.2).kept is True
    assert forecast(model, 600, 5400, 30, 0.2).kept is False
    assert alone.kept is None


def test_where_no_chunk_fits_the_prompt_still_comes(model: StepTimeModel) -> None:
    full, alone = forecast(model, 600, 0, 200), forecast(model, 600, 0, 0)
    assert full.wait_s is not None
    assert alone.wait_s is not None
    assert full.wait_s > 5 * alone.wait_s * 0.9


def test_nothing_is_said_of_a_device_that_is_not_known() -> None:
    said = forecast(StepTimeModel(), 10, 0, 0, 1.0)
    assert said.wait_s is None
    assert said.kept is None
