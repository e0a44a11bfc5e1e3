"""Errors of ours: each kind is logged once with its traceback, then at round counts, and all are counted."""

import pytest

from vllm_sarathi.engine.faults import Faults
from vllm_sarathi.engine.vllm.internals import logger


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logger, "error", lambda message, *args: said.append(message % args))
    return said


def one_way() -> None:
    raise KeyError("a")


def other_way(number: int) -> None:
    raise KeyError(number)


def note(faults: Faults, ours: object, *args: object) -> None:
    try:
        ours(*args)  # type: ignore[operator]
    except Exception as error:
        faults.note(error)


def test_a_kind_is_told_once_with_its_traceback_and_then_at_round_counts(logged: list[str]) -> None:
    faults = Faults()
    for number in range(1234):
        note(faults, other_way, number)  # the same place and type, whatever the message
    assert len(logged) == 4
    assert "Traceback" in logged[0]
    assert "in other_way" in logged[0]
    assert [line for line in logged[1:] if "Traceback" in line] == []
    for line, count in zip(logged[1:], (10, 100, 1000), strict=True):
        assert str(count) in line
        assert "KeyError at other_way" in line


def test_kinds_are_told_apart_and_counted(logged: list[str]) -> None:
    faults = Faults()
    for _ in range(3):
        note(faults, one_way)
    note(faults, other_way, 1)
    note(faults, lambda: 1 / 0)
    assert len(logged) == 3
    assert sorted(faults.counts.values()) == [1, 1, 3]
    assert faults.total == 5
    assert {kind.partition(" ")[0] for kind in faults.counts} == {"KeyError", "ZeroDivisionError"}
