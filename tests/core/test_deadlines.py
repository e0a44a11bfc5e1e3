"""When the next token is due, told from what has been delivered and from what is still under way."""

from dataclasses import replace

import pytest

from vllm_sarathi.core.deadlines import TokenDeadlines
from vllm_sarathi.core.types import DecodeView, InFlight, StepView


def test_a_step_that_still_runs_uses_up_slack_before_the_next_one() -> None:
    deadlines = TokenDeadlines("pace")
    deadlines.completed(1.0)
    before = StepView(1.0, 1, 1, 100, (), (), 512, decode_views=(DecodeView("a", 1),))
    assert deadlines.available_s(before, 0.1) == pytest.approx(0.1)
    deadlines.completed(1.03)  # 70 ms ahead, and a long step is handed out
    ahead = StepView(1.03, 1, 1, 100, (), (), 512, decode_views=(DecodeView("a", 2),))
    assert deadlines.available_s(ahead, 0.1) == pytest.approx(0.17)
    behind_it = replace(ahead, decode_views=(DecodeView("a", 3),), in_flight=(InFlight(1.03, 0.17),))
    assert deadlines.available_s(behind_it, 0.1) == pytest.approx(0.1)
