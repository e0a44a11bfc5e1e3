"""The trace command: figures, a timeline that Perfetto's format describes, and a picture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.core.test_step_trace import DECODES, HYBRID
from vllm_sarathi.benchmark.profile.trace import read_step_trace, to_perfetto, trace_table
from vllm_sarathi.cli import app
from vllm_sarathi.core.step_trace import StepTraceError, TracedStep

LATE = replace(HYBRID, at_s=HYBRID.at_s + 0.3, measured_s=0.2)
LONE = replace(HYBRID, at_s=HYBRID.at_s + 1.0, shape=replace(HYBRID.shape, decodes=0), reason="idle")
STEPS = [replace(DECODES, at_s=HYBRID.at_s - 0.1), HYBRID, LATE, LONE]


def write(path: Path, steps: list[TracedStep], tail: str = "") -> Path:
    path.write_text("".join(step.to_line() for step in steps) + tail)
    return path


def test_the_command_writes_a_timeline_and_a_picture(tmp_path: Path) -> None:
    file = write(tmp_path / "steps.jsonl", STEPS)
    out, plot = tmp_path / "new" / "trace.json", tmp_path / "plots" / "steps.png"
    done = CliRunner().invoke(app, ["trace", str(file), "-o", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["displayTimeUnit"] == "ms"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "hybrid" in done.output


def test_the_timeline_has_a_slice_per_step_where_it_ran() -> None:
    events = to_perfetto(STEPS)["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert [round(e["ts"]) for e in slices] == [0, 40_000, 240_000, 1_040_000]
    assert [round(e["dur"]) for e in slices] == [40_000, 100_000, 200_000, 100_000]
    assert [e["name"] for e in slices] == [
        "8 decodes",
        "8 decodes + 32 prefill tokens",
        "8 decodes + 32 prefill tokens",
        "40 prefill tokens",
    ]
    assert slices[1]["args"]["predicted ms"] == pytest.approx(90)
    assert [round(e["ts"]) for e in events if e["ph"] == "i"] == [440_000]  # a gap ends late, once
    assert {e["name"] for e in events if e["ph"] == "C"} == {"budget", "requests", "step"}


def test_the_table_tells_each_kind_of_step_apart() -> None:
    columns = [list(column.cells) for column in trace_table(STEPS).columns]
    assert columns[0] == ["decodes alone", "hybrid", "prefill alone"]
    assert columns[1] == ["1", "2", "1"]
    assert columns[4] == ["100.00%", "50.00%", "-"]
    assert columns[5] == ["0.0%", "32.5%", "10.0%"]
    assert columns[6] == ["0.0%", "50.5%", "10.0%"]


def test_a_line_that_is_still_being_written_is_passed_over(tmp_path: Path) -> None:
    assert read_step_trace(write(tmp_path / "steps.jsonl", STEPS, '{"at_s": 1')) == STEPS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)."),
        ("", "holds no step."),
        (HYBRID.to_line() + "{}\n" + HYBRID.to_line(), ", line 2: has no 'tokens'."),
        ("\n" + HYBRID.to_line(), ", line 1: is not valid JSON"),
        ("\xff", "cannot be read (it is not text)."),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "steps.jsonl"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(StepTraceError) as error:
        read_step_trace(file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    done = CliRunner().invoke(app, ["trace", str(file)])
    assert done.exit_code == 1
    assert message in done.output
