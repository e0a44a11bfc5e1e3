"""What a client asks for never reaches the scheduler as an exception."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.classes import AskedSlo
from vllm_sarathi.engine.request_slo import NOTHING, read_asked_slo

OPEN = SarathiConfig(allow_request_slo=True, min_request_slo_ms=20)


def test_slos_are_read_in_seconds_and_bounded_below() -> None:
    assert read_asked_slo({"tbt_slo_ms": 30, "ttft_slo_ms": 500.0}, OPEN) == AskedSlo(0.03, 0.5)
    assert read_asked_slo({"tbt_slo_ms": 1}, OPEN) == AskedSlo(0.02, None)


def test_they_are_off_unless_allowed() -> None:
    assert read_asked_slo({"tbt_slo_ms": 30}, SarathiConfig()) is NOTHING


@pytest.mark.parametrize(
    "value", ["30", float("nan"), -5, 0, 1e12, 2**64, True, [30], {"ms": 30}, float("inf"), None]
)
def test_a_bad_value_is_no_slo(value: Any) -> None:
    assert read_asked_slo({"tbt_slo_ms": value}, OPEN) is NOTHING


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.one_of(JSON, st.fixed_dictionaries({}, optional={"tbt_slo_ms": JSON, "ttft_slo_ms": JSON})))
def test_nothing_from_outside_raises(extra_args: Any) -> None:
    asked = read_asked_slo(extra_args, OPEN)
    for value in (asked.tbt_slo_s, asked.ttft_slo_s):
        assert value is None or 0.02 <= value <= 3600
