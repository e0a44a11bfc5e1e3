"""A schedule is data: exported, read back, stretched, looked at beforehand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.preview import preview_run
from autolrs_plugin.core.schedule import DECAY, Schedule, preview, unit_curve, warmup_steps

CONFIG = AutoLRSConfig(max_steps=200, lr_range=(1e-4, 1.0))
rates = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=50)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lrs=rates)
def test_what_is_saved_is_loaded_bit_for_bit(
    lrs: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    Schedule(tuple(lrs)).save(path)
    assert Schedule.load(path).lrs == tuple(lrs)


def test_a_schedule_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.json"
    Schedule((1.0,)).save(path)

    def fails(*_: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="killed here"):
        Schedule((2.0,) * 9).save(path)
    assert Schedule.load(path).lrs == (1.0,)
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_has_its_rate_and_the_last_one_stays() -> None:
    schedule = Schedule((0.1, 0.3, 0.2))
    assert [schedule(t) for t in range(5)] == [0.1, 0.3, 0.2, 0.2, 0.2]
    assert len(schedule) == 3
    with pytest.raises(ValueError, match="step=-1: the schedule has the steps 0 to 2"):
        schedule(-1)
    with pytest.raises(ValueError, match="step=0"):
        Schedule(())(0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as a schedule"),
        ("{", "cannot be read as a schedule"),
        ("[1, 2]", "must hold a JSON object, not list"),
        ("{}", "is no autolrs schedule of version 1"),
        ('{"kind": "autolrs-schedule", "version": 2, "lrs": [1]}', "is no autolrs schedule of version 1"),
        ('{"kind": "autolrs-schedule", "version": 1}', "'lrs' must be a list"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": []}', "'lrs' must be a list"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": [0.1, "x"]}', "of step 1 is 'x', not a number >= 0"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": [true]}', "of step 0 is True"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": [-0.1]}', "of step 0 is -0.1"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": [NaN]}', "of step 0 is nan"),
        ('{"kind": "autolrs-schedule", "version": 1, "lrs": [1e999]}', "of step 0 is inf"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_schedule_is_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        Schedule.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json.*cannot be read"):
        Schedule.load(tmp_path / "none.json")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lrs=rates, steps=st.integers(1, 120))
def test_stretching_keeps_the_ends_and_the_bounds(lrs: list[float], steps: int) -> None:
    schedule = Schedule(tuple(lrs))
    stretched = schedule.stretched(steps)
    assert len(stretched) == steps
    assert stretched.lrs[0] == lrs[0]
    if steps > 1:
        assert stretched.lrs[-1] == pytest.approx(lrs[-1])
    slack = 1e-9 * (1 + max(lrs))
    assert min(lrs) - slack <= min(stretched.lrs)
    assert max(stretched.lrs) <= max(lrs) + slack
    assert schedule.stretched(len(lrs)).lrs == pytest.approx(lrs)


def test_stretching_to_nothing_is_refused() -> None:
    for schedule, steps in ((Schedule((0.1,)), 0), (Schedule((0.1,)), -3), (Schedule(()), 5)):
        with pytest.raises(ConfigError, match=f"steps={steps}: must be at least 1"):
            schedule.stretched(steps)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.5), decay=st.booleans(), peak=st.floats(1e-4, 1.0))
def test_a_preview_warms_up_peaks_and_decays(steps: int, warmup: float, decay: bool, peak: float) -> None:
    config = AutoLRSConfig(max_steps=steps, lr_range=(1e-4, 1.0), warmup=warmup, final_decay=decay)
    lrs, rising = preview(config, peak).lrs, warmup_steps(config)
    assert len(lrs) == steps
    assert rising < steps
    assert all(0 < lr <= peak for lr in lrs)
    assert list(lrs[: rising + 1]) == sorted(lrs[: rising + 1])
    assert lrs[rising] == pytest.approx(peak)
    if decay:
        assert list(lrs[rising:]) == sorted(lrs[rising:], reverse=True)
        # Zero comes one step after the last: an even descent that wastes no step.
        descent = max(1, min(round(DECAY * steps), steps - rising))
        assert lrs[-1] == pytest.approx(peak / descent)
    else:
        assert set(lrs[rising:]) == {peak}


def test_a_preview_without_a_peak_takes_the_middle_of_the_range() -> None:
    assert max(preview(CONFIG).lrs) == pytest.approx(math.sqrt(1e-4))


def test_a_preview_is_what_a_run_with_that_peak_does() -> None:
    # Once: the staged plan's rate may change along the run.
    schedule = preview_run(replace(CONFIG, mode="once")).controller.schedule
    assert schedule.lrs == pytest.approx(preview(CONFIG, schedule.lrs[warmup_steps(CONFIG)]).lrs)


def test_the_unit_curve_is_the_one_of_the_books() -> None:
    assert [unit_curve(t, 6, 2) for t in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])
    assert unit_curve(5, 6, 2, final_decay=False) == 1.0


def test_a_schedule_is_plain_values() -> None:
    values: dict[str, Any] = json.loads(json.dumps(Schedule((0.1, 0.2)).to_mapping()))
    assert values == {"kind": "autolrs-schedule", "version": 1, "lrs": [0.1, 0.2]}
    assert Schedule.from_mapping(values) == Schedule((0.1, 0.2))
