"""The demo from end to end against a server without a model, and its picture on made-up records."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from tests.benchmark.fake_vllm import FAKE
from vllm_sarathi.benchmark.live import demo, server
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord
from vllm_sarathi.benchmark.live.timeline import draw_timeline


@pytest.fixture
def quick_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "vllm_command", lambda *_: FAKE)


@pytest.mark.usefixtures("quick_scenario")
def test_the_demo_leaves_figures_a_picture_and_what_was_said(tmp_path: Path) -> None:
    console = Console(record=True, width=140)
    demo.run_demo("m", tmp_path, 77, console)

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["schema"] == 1
    assert list(result["runs"]) == ["default", "sarathi"]
    for run in result["runs"].values():
        assert list(run) == ["gap_ms", "ttft_ms", "requests", "completed", "output_tokens_per_s"]
        assert list(run["gap_ms"]) == ["p50", "p90", "p99", "max"]
        assert list(run["ttft_ms"]) == ["mean", "p50", "p90", "p99"]
        assert run["requests"] == run["completed"] == len(demo.scenario())
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    arguments = {
        name: (tmp_path / f"server-{name}.log").read_text().splitlines()[0].split() for name in result["runs"]
    }
    assert arguments["default"][-2:] == ["--scheduler", "default"]
    assert arguments["sarathi"][-4:] == ["--scheduler", "sarathi", "--token-budget", "77"]
    said = console.export_text()
    assert "w0 w1 w2" in said
    assert "time between tokens, P99, ms" in said


@pytest.mark.usefixtures("quick_scenario")
def test_a_failed_request_is_told_after_the_results_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSE", "lighthouse")
    with pytest.raises(RuntimeError, match="default, chat 2: HTTP 400"):
        demo.run_demo("m", tmp_path, 77, Console(record=True))
    assert json.loads((tmp_path / "result.json").read_text())["runs"]["default"]["completed"] == 9


@pytest.mark.usefixtures("quick_scenario")
def test_a_scenario_that_the_client_missed_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CLIENT_STALL_LIMIT_S", -1.0)  # as if every take had been disturbed
    console = Console(record=True, width=200)
    demo.run_demo("m", tmp_path, 77, console)
    said = console.export_text()
    assert said.count("playing again") == 2 * (demo.TAKES - 1)
    assert said.count("the figures include that") == 2


def test_the_scenario_is_the_same_each_time_and_holds_long_prompts_among_running_chats() -> None:
    assert demo.scenario() == demo.scenario()
    longs = [request for request in demo.scenario() if request.name.startswith("long")]
    chats = [request for request in demo.scenario() if request not in longs]
    assert len(longs) >= 3
    cues = [request.after for request in longs]
    assert {cue[0] for cue in cues if cue} == {chats[-1].name}
    assert sorted(cue[1] for cue in cues if cue) == [cue[1] for cue in cues if cue]
    # Every chat goes on while the last prompt is read: no two of them start further apart than this, in tokens.
    ahead = len(chats) * demo.CHAT_EVERY_TOKENS
    assert max(cue[1] for cue in cues if cue) + ahead < demo.CHAT_TOKENS
    assert all(len(request.prompt) > 6000 for request in longs)
    assert len({request.prompt for request in longs}) == len(longs)


def red_pixels(picture: Path) -> int:
    """How many pixels are drawn in about the colour of a silence."""
    red, green, blue = np.moveaxis(matplotlib.image.imread(picture)[..., :3], -1, 0)
    return int(np.sum((red > 0.75) & (green < 0.4) & (blue < 0.4)))


def chat(name: str, *gaps_s: float) -> StreamRecord:
    times = np.cumsum([0.2, *gaps_s])
    return StreamRecord(name, 0.0, tuple(Delivery(float(at_s), 1) for at_s in times), "", 5, len(times))


def test_a_stall_is_red_and_a_steady_stream_is_not(tmp_path: Path) -> None:
    steady = [chat(f"chat {n}", *[0.1] * 60) for n in range(4)]
    stalled = [chat(f"chat {n}", *[0.1] * 20, 4.0, *[0.1] * 20) for n in range(4)]
    for name, records in {"steady": steady, "stalled": stalled}.items():
        draw_timeline({"a": records, "b": steady}, frozenset(), tmp_path / f"{name}.png", title="t")
    legend_only = red_pixels(tmp_path / "steady.png")
    assert red_pixels(tmp_path / "stalled.png") > 5 * max(legend_only, 1)


def test_streams_to_which_nothing_came_are_drawn_too(tmp_path: Path) -> None:
    silent = StreamRecord("long 1", 1.0, (), "", 0, 0, error="HTTP 500")
    draw_timeline({"a": [chat("chat 1", 0.1), silent]}, frozenset({"long 1"}), tmp_path / "p.png", title="t")
    assert (tmp_path / "p.png").stat().st_size > 5_000
