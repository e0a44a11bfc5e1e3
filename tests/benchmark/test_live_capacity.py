"""The capacity search on a live server: what it asks the server, how it judges, and one search for real."""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_sarathi.benchmark.capacity.search import Criterion
from vllm_sarathi.benchmark.live import capacity as live_capacity
from vllm_sarathi.benchmark.live.capacity import (
    LIVE_TOLERANCE,
    carries,
    find_live,
    median_between,
    parse_live,
    queue_times,
)
from vllm_sarathi.benchmark.live.load import Load, read_result, write_load
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord
from vllm_sarathi.cli import app

METRICS = """# HELP vllm:request_queue_time_seconds Time in the queue.
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.5",model_name="m"} {half}
vllm:request_queue_time_seconds_bucket{engine="0",le="2.0",model_name="m"} {two}
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} {all}
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} {all}
"""


def metrics(half: float, two: float, every: float) -> str:
    text = METRICS
    for name, value in (("half", half), ("two", two), ("all", every)):
        text = text.replace("{" + name + "}", str(value))
    return text


def record(gap_s: float, ttft_s: float = 0.2, error: str | None = None) -> StreamRecord:
    times = accumulate([gap_s] * 4, initial=ttft_s)
    return StreamRecord("r", 0.0, tuple(Delivery(t, 1) for t in times), "", 9, 5, error)


def test_the_median_of_what_the_queue_times_gained() -> None:
    before, after = queue_times(metrics(10.0, 10.0, 10.0)), queue_times(metrics(14.0, 20.0, 20.0))
    assert after == {0.5: 14.0, 2.0: 20.0, float("inf"): 20.0}
    # Four of ten below 0.5 s and the other six below 2 s: the fifth is a sixth of the way.
    assert median_between(before, after) == pytest.approx(0.5 + 1.5 / 6)
    assert median_between(after, after) is None
    assert median_between({}, {}) is None
    assert median_between({}, queue_times(metrics(0.0, 1.0, 9.0))) == float("inf")
    two_engines = metrics(1.0, 1.0, 1.0) + metrics(1.0, 1.0, 1.0).replace('engine="0"', 'engine="1"')
    assert queue_times(two_engines)[0.5] == 2.0


def test_a_live_run_is_judged_as_a_simulated_one() -> None:
    criterion = Criterion(100.0)
    assert carries(criterion, [record(0.09)] * 3, 1.9)
    assert not carries(criterion, [record(0.11)] * 3, 1.9)
    assert not carries(criterion, [record(0.09)] * 3, 2.1)
    assert not carries(criterion, [record(0.09), record(0.09, error="HTTP 500")], 0.1)
    # Where the server does not tell, the time to first token is the judge.
    assert carries(criterion, [record(0.09, ttft_s=1.9)] * 3, None)
    assert not carries(criterion, [record(0.09, ttft_s=2.1)] * 3, None)
    assert carries(Criterion(None), [record(9.0)], 0.1)


class Handler(BaseHTTPRequestHandler):
    """Answers what the search asks beside the load."""

    pages: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        page = self.pages.get(self.path)
        self.send_response(404 if page is None else 200)
        self.end_headers()
        self.wfile.write((page or "").encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.pages = {"/v1/models": json.dumps({"data": [{"id": "served"}]}), "/metrics": metrics(0, 0, 0)}
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def asked(url: str, out: Path, **changes: Any) -> live_capacity.LiveAsked:
    values: dict[str, Any] = {
        "url": url, "model": "m", "workload": "short", "tbt_slo_ms": 100.0, "max_delay_s": 2.0,
        "scheduler": "sarathi@64", "requests": 12, "rate_qps": 1.0, "seeds": 2, "out": out,
    }  # fmt: skip
    return parse_live(**(values | changes))


def fake_send(capacity_qps: float, served: list[str], delayed: bool = False) -> Any:
    """Return a client whose gaps, or else the server's queue times, break the SLO above a rate."""

    def send(load: Load, base_url: str, result: Path, *, served_name: str, **_: Any) -> None:
        served.append(served_name)
        over = len(load.arrivals) / (load.duration_s or 1e-9) > capacity_qps * 12 / 11
        gap = 0.5 if over and not delayed else 0.05
        if over and delayed:
            Handler.pages["/metrics"] = metrics(0, 0, 1000 * len(served))
        elif delayed:
            Handler.pages["/metrics"] = metrics(1000 * len(served), 1000 * len(served), 1000 * len(served))
        result.write_text(
            json.dumps(
                {
                    "start_times": [a.at_s for a in load.arrivals],
                    "ttfts": [0.1 for _ in load.arrivals],
                    "itls": [[gap] * (a.output_tokens - 1) for a in load.arrivals],
                    "output_lens": [a.output_tokens for a in load.arrivals],
                    "errors": ["" for _ in load.arrivals],
                }
            )
        )

    return send


@pytest.mark.parametrize("delayed", [False, True], ids=["by gaps", "by queue times"])
def test_the_rate_is_found_on_a_live_server(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delayed: bool
) -> None:
    served: list[str] = []
    monkeypatch.setattr(live_capacity, "send", fake_send(3.0, served, delayed))
    monkeypatch.setattr(live_capacity, "draw_arrivals", even_arrivals)
    row = find_live(asked(url, tmp_path), Console(record=True))
    assert set(served) == {"served"}
    assert row["deployment"] == url
    assert (row["scheduler"], row["token_budget"], row["workload"]) == ("sarathi", 64, "short")
    assert row["capacity_qps"] <= 3.0 < row["capacity_qps"] * (1 + LIVE_TOLERANCE)
    assert row["gap_ms"]["p99"] == pytest.approx(50.0)


def even_arrivals(workload: Any, seed: int) -> Sequence[Any]:
    from vllm_sarathi.benchmark.live.arrivals import Arrival

    return [Arrival(i / workload.rate_per_s, 10, 5) for i in range(workload.requests)]


def test_a_server_that_carries_nothing_says_so(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_capacity, "send", fake_send(0.0, []))
    monkeypatch.setattr(live_capacity, "draw_arrivals", even_arrivals)
    done = CliRunner().invoke(
        app,
        ["bench", "live", "--capacity", "--url", url, "--model", "m", "--out", str(tmp_path),
         "--tbt-slo-ms", "100", "--json", str(tmp_path / "rows.json")],
        env={"COLUMNS": "160"},
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "no rate meets it" in done.output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["schema"] == 1
    [row] = written["rows"]
    assert (row["capacity_qps"], row["gap_ms"]["p99"]) == (None, 500.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--url None: --capacity needs the server's address"),
        (["--url", "localhost:8000"], "--url 'localhost:8000': --capacity needs"),
        (["--url", "http://127.0.0.1:9"], "--url http://127.0.0.1:9: does not answer"),
        (["--url", "http://x", "--workload", "shortt"], "did you mean 'short'?"),
        (["--url", "http://x", "--tbt-slo-ms", "0"], "--tbt-slo-ms 0.0: must be"),
        (["--url", "http://x", "--rate", "-1"], "--rate -1.0: must be"),
        (["--url", "http://x", "--requests", "1"], "--requests 1: must be"),
        (["--url", "http://x", "--seeds", "0"], "--seeds 0: must be"),
        (["--url", "http://x", "--max-delay-s", "nan"], "--max-delay-s nan: must be"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "live", "--capacity", "--out", str(tmp_path), *arguments])
    assert done.exit_code == 1
    assert said in re.sub(r"\s+", " ", done.output)


def test_a_server_of_something_else_is_named(url: str, tmp_path: Path) -> None:
    Handler.pages["/v1/models"] = "hello"
    with pytest.raises(RuntimeError, match="is not a model server"):
        find_live(asked(url, tmp_path), Console(record=True))


def test_the_load_of_a_rate_is_read_back(tmp_path: Path) -> None:
    load = write_load("x", even_arrivals(asked("http://x", tmp_path).workload, 0), "m", tmp_path)
    fake_send(9.0, [])(load, "http://x", tmp_path / "r.json", served_name="served")
    records = read_result(tmp_path / "r.json", load)
    assert [r.error for r in records] == [None] * 12
