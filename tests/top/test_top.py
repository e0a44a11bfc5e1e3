"""`vllm-sarathi top`: what it makes of two scrapes, and what it says where there is nothing to make of."""

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from rich.console import Console
from typer.testing import CliRunner

from vllm_sarathi.cli import app
from vllm_sarathi.core.figures import ClassGaps, Figures, FinishedStep, Queues
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.engine.metrics import FiguresFiles
from vllm_sarathi.top.scrape import TopError, fetch, metrics_url, parse
from vllm_sarathi.top.view import View, compare, render

STOCK = '# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'


def step(measured_s: float, decodes: int = 8) -> FinishedStep:
    shape = StepShape(decodes + 32, decodes, 4000, 512.0, decodes + 1)
    traced = TracedStep(1.0, shape, 48, "slo", 0.1, measured_s, 0.1, 9, 3)
    return FinishedStep(traced, (ClassGaps("default", decodes, 0.1),))


class Page:
    """The /metrics of a server with one engine."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.figures = Figures()
        self._files, self._folder = FiguresFiles(folder, rank, 1), folder

    def text(self) -> str:
        self._files.write(self.figures.samples(), 1.0)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._folder))
        return generate_latest(registry).decode() + STOCK


@pytest.fixture
def page(tmp_path: Path) -> Page:
    page = Page(tmp_path)
    page.figures.take([step(0.05)])
    page.figures.look(Queues(2, {"default": 3}))
    page.figures.set("tbt_slo_seconds", 0.1)
    return page


def test_rates_are_of_the_time_between_two_scrapes(page: Page) -> None:
    before = parse(page.text(), "url", 10.0)
    page.figures.take([step(0.05), step(0.09), step(0.11), step(0.3)])
    page.figures.set("headroom_tokens_per_second", 0.0)
    page.figures.set("slo_unattainable", 1, "default")
    engine = compare("url", before, parse(page.text(), "url", 14.0)).engines["0"]
    assert engine.steps_per_s == 1.0
    assert engine.prefill_tokens_per_s == 32.0
    assert engine.prediction_bias == pytest.approx(0.55 / 0.4)
    assert (engine.running, engine.waiting, engine.kv_cache_usage) == (2, 3, 0.25)
    assert engine.unattainable is True
    assert engine.headroom_tokens_per_s == 0
    gaps = engine.classes["default"].gaps
    assert gaps.per_s == 8.0
    assert gaps.kept == 0.5
    assert gaps.kept_since_start == 0.6
    assert engine.classes["default"].first_tokens.kept is None


def test_a_server_that_has_started_anew_counts_from_nought(page: Page, tmp_path: Path) -> None:
    page.figures.take([step(0.05)] * 9)
    before = parse(page.text(), "url", 0.0)
    (tmp_path / "new").mkdir()
    again = Page(tmp_path / "new")
    again.figures.take([step(0.05)] * 2)
    engine = compare("url", before, parse(again.text(), "url", 1.0)).engines["0"]
    assert engine.steps_per_s == 2.0
    assert engine.classes["default"].gaps.per_s == 16.0


def test_quantiles_are_those_of_the_interval(page: Page) -> None:
    before = parse(page.text(), "url", 0.0)
    times_s = np.random.default_rng(0).uniform(0.0, 0.13, 4000)
    page.figures.take([step(float(t), decodes=1) for t in times_s if t > 0])
    gaps = compare("url", before, parse(page.text(), "url", 1.0)).engines["0"].classes["default"].gaps
    assert gaps.ratio_p50 == pytest.approx(0.65, abs=0.03)  # each within its bucket
    # The last bucket in use is that from 1.25 to 1.5, and within one the gaps are taken to be spread evenly.
    below = 1.25 / 1.3
    assert gaps.ratio_p99 == pytest.approx(1.25 + 0.25 * (0.99 - below) / (1 - below), abs=0.04)


def test_what_is_beyond_the_last_bucket_is_at_its_bound(page: Page) -> None:
    before = parse(page.text(), "url", 0.0)
    page.figures.take([step(100.0)])
    gaps = compare("url", before, parse(page.text(), "url", 1.0)).engines["0"].classes["default"].gaps
    assert gaps.ratio_p50 == gaps.ratio_p99 == 10.0


def test_engines_stand_apart_and_in_order(page: Page, tmp_path: Path) -> None:
    for rank in (10, 2):
        other = Page(tmp_path, rank)
        other.figures.take([step(0.05)] * rank)
        text = other.text()
    scrape = parse(text + page.text().replace("vllm_sarathi", "other"), "url", 0.0)
    engines = compare("url", scrape, scrape).engines
    assert list(engines) == ["2", "10"]
    assert engines["10"].classes["default"].gaps.kept_since_start == 1.0


def test_figures_that_are_no_numbers_are_left_out(page: Page) -> None:
    text = page.text().replace(
        'vllm_sarathi_tbt_slo_seconds{engine="0"} 0.1', 'vllm_sarathi_tbt_slo_seconds{engine="0"} NaN'
    )
    scrape = parse(text, "url", 0.0)
    view = compare("url", scrape, scrape)
    assert view.engines["0"].tbt_slo_s is None
    json.dumps(view.to_mapping(), allow_nan=False)
    assert not any(isinstance(v, float) and math.isnan(v) for v in vars(view.engines["0"]).values())


def test_the_table_tells_what_is_wrong(page: Page) -> None:
    page.figures.set("slo_unattainable", 1, "default")
    page.figures.count("faults", amount=3)
    before = parse(page.text(), "url", 0.0)
    page.figures.take([step(0.3)])
    text = printed(compare("http://x/metrics", before, parse(page.text(), "url", 1.0)), width=80)
    assert "SLO 100 ms, decodes alone - ms: cannot be kept" in text
    assert "3 faults" in text
    assert "0.0%" in text
    assert "http://x/metrics" in text


def test_an_slo_that_cannot_be_kept_is_told_with_its_class(page: Page) -> None:
    for name, value in {"default": 1, "interactive": 1, "slow": 0, "standard": 1}.items():
        page.figures.set("slo_unattainable", value, name)
    scrape = parse(page.text(), "url", 0.0)
    view = compare("url", scrape, scrape)
    assert "decodes alone - ms: cannot be kept (standard, interactive)" in printed(view, width=80)
    classes = view.to_mapping()["engines"]["0"]["classes"]
    assert {name: each["unattainable"] for name, each in classes.items()} == {
        "default": True,
        "interactive": True,
        "slow": False,
        "standard": True,
    }
    older = parse('vllm_sarathi_slo_unattainable{engine="0"} 1\n', "url", 0.0)
    assert "- ms: cannot be kept\n" in printed(compare("url", older, older), width=80)


def printed(view: View, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(view))
    return console.export_text()


def test_eighty_columns_are_enough_for_large_numbers(page: Page) -> None:
    page.figures.set("headroom_tokens_per_second", 123_456.7)
    for figure in ("relegated_requests", "refused_requests"):
        page.figures.count(figure, "interactive", 12_345)
    before = parse(page.text(), "url", 0.0)
    page.figures.take([step(0.3, decodes=1_111)] * 9)
    view = compare("http://x/metrics", before, parse(page.text(), "url", 0.1))
    wide, narrow = (printed(view, width) for width in (200, 80))
    words = [[line.split() for line in text.splitlines() if "─" not in line] for text in (wide, narrow)]
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("http://h:1/", "http://h:1/metrics"),
        ("https://h/prefix/metrics", "https://h/prefix/metrics"),
        ("http://[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_a_server_is_found_by_any_usual_name(given: str, address: str) -> None:
    assert metrics_url(given) == address


@pytest.mark.parametrize(
    "given",
    [
        "",
        "ftp://h",
        "http://",
        "h:port",
        "http://h:0",
        "http://a b/",
        "file:///x",
        "http://[::1",
        "me:key@h:8000",
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(TopError, match="must be the address of a server"):
        metrics_url(given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no figures of vllm-sarathi (not a vLLM server's)"),
        (STOCK, "no figures of vllm-sarathi (a vLLM server)"),
        ("<html>hello</html>", "is not in Prometheus's text format"),
        ("vllm_sarathi_steps_total many", "is not in Prometheus's text format"),
        ("{\x1b[2J" * 999, "is not in Prometheus's text format (Invalid labels: \ufffd[2J"),
        *[
            (f'vllm_sarathi_x_bucket{{engine="0",slo_class="a"{le}}} 1\n', "_x_bucket has le=")
            for le in (',le="x"', ',le="NaN"', "")
        ],
    ],
)
def test_what_is_no_page_of_ours_is_said(text: str, said: str) -> None:
    with pytest.raises(TopError) as error:
        parse(text, "http://h/metrics", 0.0)
    assert said in str(error.value)
    assert str(error.value).startswith("http://h/metrics: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


FOREIGN = (
    'vllm_sarathi_steps_total{engine="[bold]0[/x]"} 3\n'
    'vllm_sarathi_gaps_total{engine="[bold]0[/x]",slo_class="[/bold]\x1b[2J"} 1e308\n'
    'vllm_sarathi_gaps_total{engine="[bold]0[/x]",slo_class="[/bold]\x1b[2J",more="1"} 1e308\n'
    'vllm_sarathi_step_predicted_seconds_total{engine="[bold]0[/x]"} 1e-308\n'
    'vllm_sarathi_step_measured_seconds_total{engine="[bold]0[/x]"} 1e308\n'
)


def test_what_a_page_says_is_no_markup_and_moves_no_cursor_and_missing_figures_are_dashes() -> None:
    empty = parse('vllm_sarathi_faults_total{engine="0"} 0\n', "url", 0.0)
    view = compare("http://[/red]/metrics", empty, parse(FOREIGN, "url", 1.0))
    json.dumps(view.to_mapping(), allow_nan=False)
    text = printed(view, width=120)
    assert "engine [bold]0[/x]  - running, - waiting, KV -" in text
    assert "[/bold]\ufffd[2J" in text
    assert "http://[/red]/metrics" in text
    assert "measured/predicted -" in text
    assert "\x1b" not in text


# Over HTTP.

Serve = Callable[[Callable[[], tuple[int, bytes]]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that serves an answer on loopback and returns the address."""
    servers: list[HTTPServer] = []

    def start(answer: Callable[[], tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                status, body = answer()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    asked: list[str] = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    assert set(asked) <= {"/metrics"}  # it touches nothing else


def test_once_in_json(serve: Serve, page: Page) -> None:
    def answer() -> tuple[int, bytes]:
        page.figures.take([step(0.05)])
        return 200, page.text().encode()

    done = CliRunner().invoke(app, ["top", serve(answer), "--once", "--json", "--interval", "0.2"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["interval_s"] == pytest.approx(0.2, abs=0.15)
    assert said["engines"]["0"]["classes"]["default"]["gaps"]["kept"] == 1.0
    assert said["engines"]["0"]["steps_per_s"] * said["interval_s"] == pytest.approx(1.0)


def test_once_as_a_table(serve: Serve, page: Page) -> None:
    address = serve(lambda: (200, page.text().encode()))
    done = CliRunner().invoke(app, ["top", address, "--once", "--interval", "0.1"])
    assert done.exit_code == 0
    assert "default" in done.stdout


def test_who_reads_no_more_of_it_is_told_nothing(serve: Serve, page: Page) -> None:
    address = serve(lambda: (200, page.text().encode()))
    command = [
        sys.executable,
        "-c",
        "from vllm_sarathi.cli import main; main()",
        "top",
        address,
        "--once",
        "--json",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [*command, "--interval", "0.1"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert "error" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"", "the server answers 404"),
        (200, STOCK.encode(), "has no figures of vllm-sarathi"),
        (200, b"\xff\xfe\x00", "has no figures|text format"),
    ],
)
def test_a_server_that_is_none_of_ours(
    serve: Serve, status: int, body: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = CliRunner().invoke(app, ["top", serve(lambda: (status, body)), "--once"])
    assert done.exit_code == 1
    assert any(part in done.output for part in said.split("|"))
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\x1b[2J is no HTTP\r\n\r\n", "cannot be read (\ufffd[2J is no HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + STOCK.encode(),
            "cannot be read (it ends too soon)",
        ),
    ],
)
def test_a_broken_answer_is_said_and_moves_no_cursor(answer: bytes, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_once() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        server = threading.Thread(target=serve_once)
        server.start()
        with pytest.raises(TopError) as error:
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics", 10.0)
        server.join()
    assert said in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["127.0.0.1:1", "--once"], "cannot be reached (Connection refused)"),
        (["127.0.0.1:1", "--interval", "0"], "--interval 0: must be a number of seconds from 0.1 to 3600."),
        (["127.0.0.1:1", "--interval", "nan"], "--interval nan: must be a number"),
        (["127.0.0.1:1", "--json"], "--json: valid with --once."),
        (["ftp://h", "--once"], "'ftp://h': must be the address of a server"),
    ],
)
def test_options_that_cannot_be_used_are_said(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["top", *arguments])
    assert done.exit_code == 1
    assert said in done.output
