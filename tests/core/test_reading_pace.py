"""How fast prompts are read: worked out once a step, and anew when what it depends on has changed."""

from types import SimpleNamespace
from typing import Any

from vllm_sarathi.core.order.pace import ReadingPace
from vllm_sarathi.core.types import ONE_STAGE, Reason, StepRecord, StepShape


def record(decodes: int) -> StepRecord:
    shape = StepShape(decodes + 100, decodes, 1000 * decodes, 0.0, decodes + 1)
    return StepRecord(shape, decodes + 100, Reason.SLO, None, 0.1, float(decodes))


def test_the_pace_is_worked_out_once_a_step() -> None:
    asked: list[int] = []

    def seconds(tokens: int, decodes: int, *others: Any) -> float:
        asked.append(tokens)
        return 0.001 * decodes + 0.0001 * (tokens - decodes)

    model: Any = SimpleNamespace(ready=True, margin=1.0, work_s=0.0, seconds=seconds)
    pace = ReadingPace(model, ONE_STAGE)

    def cost() -> int:
        before = len(asked)
        pace.token_s(0.01)
        return len(asked) - before

    pace.least_tbt_slo_s = 0.06
    pace.observe(record(decodes=20), no_room=False)
    assert [cost() > 0, cost(), cost()] == [True, 0, 0]
    quick = pace.token_s(0.01)
    pace.observe(record(decodes=40), no_room=False)
    assert cost() > 0
    assert pace.token_s(0.01) > quick  # beside more decodes
    pace.least_tbt_slo_s = 0.05
    assert cost() > 0
