"""Gaps as clients see them: what the figures are told is what came, across preemptions, too."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.virtual import VirtualEngine
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.figures import ClassGaps, TokenWait
from vllm_sarathi.core.types import StepRecord
from vllm_sarathi.testing.modelled import ModelledEngine

CLASSES = {
    "classes": {"chat": {"tbt_slo_ms": 100, "ttft_slo_ms": 5000}, "night": {"batch": True, "max_wait_s": 5}}
}


class Told:
    """Stands in for the telemetry.

    Attributes:
        gaps: the lengths of the gaps, by class; to a ten-thousandth of a second.
        resumed: those of them that a preemption was in.
        first_tokens: first tokens, by class.
    """

    def __init__(self, scheduler: Any) -> None:
        self.gaps: dict[str, Counter[float]] = defaultdict(Counter)
        self.resumed: list[TokenWait] = []
        self.first_tokens: Counter[str] = Counter()
        self.batch_tokens = 0
        scheduler.telemetry = SimpleNamespace(note=self._note, count=lambda *args: None)

    def _note(
        self,
        record: StepRecord,
        running: int,
        waiting: int,
        gaps: tuple[ClassGaps, ...],
        first_tokens: tuple[TokenWait, ...],
        resumed: tuple[TokenWait, ...],
        batch_tokens: int,
    ) -> None:
        for each in gaps or (ClassGaps("default", record.shape.decodes, None),):
            self.gaps[each.slo_class][round(record.measured_s, 4)] += each.decodes
        for wait in resumed:
            self.gaps[wait.slo_class][round(wait.taken_s, 4)] += 1
        self.resumed += resumed
        self.first_tokens.update(wait.slo_class for wait in first_tokens)
        self.batch_tokens += batch_tokens


def seen(token_s: Iterable[list[float]]) -> Counter[float]:
    """Return the lengths of the gaps between the times of each stream."""
    return Counter(round(b - a, 4) for times in token_s for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("way", ["plan", "stock"])
def test_a_gap_with_a_preemption_in_it_counts_once_with_its_length(make_config: Any, way: str) -> None:
    config = SarathiConfig(
        tbt_slo_ms=100, ttft_slo_ms=60_000, prefill_order="deadline", calibration_dir="none"
    )
    engine = VirtualEngine(make_config(config, max_model_len=2048), num_blocks=130)
    told = Told(engine.scheduler)
    if way == "stock":
        engine.scheduler._apply_plan = None
    for i in range(5):
        engine.add(f"chat{i}", 300, max_tokens=300)
    assert engine.run_until(lambda: len(engine.finished_s) == 5)
    assert len(told.resumed) > 1, "the case shows nothing: nobody was preempted"
    assert {wait.slo_s for wait in told.resumed} == {0.1}
    assert max(wait.taken_s for wait in told.resumed) > 1.0
    assert +told.gaps["default"] == seen(engine.token_s.values())
    assert told.first_tokens == {"default": 5}


def test_batch_work_that_gives_way_is_told_of_too(make_config: Any) -> None:
    config = SarathiConfig.from_mapping({"slo_classes": CLASSES, "calibration_dir": "none"})
    engine = VirtualEngine(make_config(config, max_model_len=4096, max_num_seqs=4))
    told = Told(engine.scheduler)
    for i in range(8):
        engine.add(f"night{i}", 300, 400, sampling={"extra_args": {"slo_class": "night"}})
    for i in range(20):
        engine.run_to(engine.now_s + 0.5)
        engine.add(f"chat{i}", 300, 20, sampling={"extra_args": {"slo_class": "chat"}})
    assert engine.run_until(lambda: len(engine.finished_s) == 28)
    assert engine.scheduler.faults.total == 0
    assert {wait.slo_class for wait in told.resumed} == {"night"}
    assert {wait.slo_s for wait in told.resumed} == {None}
    for name in ("chat", "night"):
        assert +told.gaps[name] == seen(s for who, s in engine.token_s.items() if who.startswith(name))
    again = sum(
        tokens for s in engine.steps for who, tokens in s.scheduled.items() if who.startswith("night")
    )
    assert told.batch_tokens == again - sum(told.gaps["night"].values()) + len(told.resumed)


@pytest.mark.parametrize("mode", ["async", "pipeline"])
def test_a_token_that_was_on_its_way_came_before_the_wait(make_config: Any, mode: str) -> None:
    """A batch in flight brings a last token after the preemption."""
    config = SarathiConfig(tbt_slo_ms=100, ttft_slo_ms=60_000, prefill_order="deadline")
    engine = ModelledEngine(make_config(config, mode), num_blocks=18, in_flight=2)
    told, token_s, now_s = Told(engine.scheduler), defaultdict[str, list[float]](list), 0.0
    engine.scheduler.clock = lambda: now_s
    for name in "abc":
        engine.add(name, 40, max_tokens=100)
    while not engine.idle():
        now_s += 1.0
        engine.step()
        for name, tokens in engine.outputs.items():
            token_s[name] += [now_s] * (len(tokens) - len(token_s[name]))
    assert engine.scheduler.faults.total == 0
    assert told.resumed, "the case shows nothing: nobody was preempted"
    waits = sorted(wait.taken_s for wait in told.resumed)
    step_s = 2.0 if mode == "pipeline" else 1.0
    longest = sorted(seen(token_s.values()).elements())[-len(waits) :]
    assert min(longest) > step_s
    # In a pipeline the last batch to end may be another than that with its token.
    assert all(abs(a - b) < step_s for a, b in zip(waits, longest, strict=True))
    assert told.first_tokens == {"default": 3}


def test_a_request_that_ends_while_it_stands_still_is_forgotten(make_config: Any) -> None:
    config = SarathiConfig(tbt_slo_ms=100, calibration_dir="none")
    engine = VirtualEngine(make_config(config, max_model_len=2048), num_blocks=130)
    Told(engine.scheduler)
    for i in range(5):
        engine.add(f"chat{i}", 300, max_tokens=300)
    scheduler = engine.scheduler

    def standing() -> list[str]:
        return [f"chat{i}" for i in range(5) if f"chat{i}" in scheduler.interrupted]

    assert engine.run_until(standing)
    scheduler.finish_requests(standing(), RequestStatus.FINISHED_ABORTED)
    assert not standing()
