"""`bench classes` in small: each question has an answer, and the judges count what they say."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sarathi.benchmark.capacity.classes import (
    QUESTIONS,
    Cell,
    _all_but,
    _chat_task,
    _work,
    ask,
    cells_of,
    question_table,
)
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

pytest.importorskip("vllm")

REQUESTS = {"mixed": 40, "beside": 24, "tenants": 24, "refusal": 24}
"""Requests in a run, with which each search is short: with too few, rate after rate is tried before one is too high."""


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_has_an_answer(question: str) -> None:
    row = ask(Cell(question, "mistral-7b/a100", REQUESTS[question], 0, 0.5))
    assert row["seeds"] == "design"
    assert row["question"] == question
    assert question_table(question, [row]).row_count == 1
    figures: dict[str, Any] = {
        "mixed": ("sarathi_qps",),
        "beside": ("batch_share", "kept"),
        "tenants": ("ratio",),
        "refusal": ("kept", "refused"),
    }
    for name in figures[question]:
        assert math.isfinite(row[name])
        assert row[name] >= 0


def test_work_is_what_was_read_and_written_by_then() -> None:
    answered = RequestLog(SimulatedRequest(0.0, 100, 4), 0.0, [1.0, 2.0, 3.0, 4.0], True)
    waiting = RequestLog(SimulatedRequest(0.0, 100, 4))
    assert _work([answered, waiting], 2.5) == 102
    assert _work([answered, waiting], 0.5) == 0


def test_a_run_ends_when_all_but_one_kind_are_answered() -> None:
    batch, chat = (RequestLog(SimulatedRequest(0.0, 1, 1, kind=kind)) for kind in ("batch", "chat"))
    run: Any = SimpleNamespace(logs=[batch, chat])
    assert not _all_but("batch")(run)
    chat.finished = True
    assert _all_but("batch")(run)


def test_an_unknown_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mixed'"):
        cells_of(["mixt"], "mistral-7b/a100", [0], 60, 0.5)


def test_the_slo_of_the_one_class_is_that_of_its_requests() -> None:
    [cell] = cells_of(["refusal"], "mistral-7b/a100", [0], 60, 0.5, ttft_slo_ms=300)
    task = _chat_task(cell, "refuse")
    assert task.workload.ttft_slo_ms == 300
    [(_, classes)] = task.settings
    assert classes["classes"]["chat"]["ttft_slo_ms"] == 300
