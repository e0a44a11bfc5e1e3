"""A real `vllm serve` with two engines and two API servers: figures, dashboards' queries, control, the terminal view.

One server for all of it, as each takes a minute to start.
"""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.engine.test_control import malformed
from tests.operations.queries import RULES, grafana_queries, keda_queries
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import Server, free_port, serve
from vllm_sarathi.cli import app

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEY = "a key of the test's"
FLAGS = [
    "--served-model-name=tiny",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    "--seed=0",
    "--api-server-count=2",
    "--data-parallel-size=2",
    f"--api-key={KEY}",
    "--enable-per-request-metrics",
    "--tbt-slo-ms=500",
    "--prefill-order=deadline",
    "--ttft-slo-ms=60000",
]
PATIENCE_S = 120.0


def write_entry_points(folder: Path) -> None:
    """Make this checkout's entry points those that a Python with `folder` on its path finds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"vllm_sarathi-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@dataclass
class Deployment:
    """The server, and what asks it."""

    server: Server
    client: httpx.Client
    calibrations: Path

    def generate(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": "many words " * 8, "max_tokens": 24, "ignore_eos": True, **fields}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def figures(self) -> dict[str, float]:
        """Return our figures, from a connection of its own: any of the API servers may answer."""
        page = httpx.get(self.server.base_url + "/metrics", trust_env=False, timeout=30).text
        ours = [line for line in page.splitlines() if line.startswith("vllm_sarathi_")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in ours}

    def load(self, requests: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            for answer in pool.map(lambda _: self.generate(), range(requests)):
                assert answer["usage"]["completion_tokens"] == 24

    def wait_for_headroom(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        wanted = {HEADROOM.format(rank=rank) for rank in RANKS}
        while missing := wanted - set(self.figures()):
            assert time.monotonic() < deadline_s, f"no {missing}"
            self.load(8)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("served")
    tiny_model(folder / "tiny")
    write_entry_points(folder)
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_PLUGINS": "sarathi,sarathi_control",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(folder),
    }
    flags = [*FLAGS, f"--calibration-dir={folder / 'kept'}"]
    with (
        serve(str(folder / "tiny"), flags, log_path=folder / "server.log", env=env) as server,
        httpx.Client(
            base_url=server.base_url,
            headers={"Authorization": f"Bearer {KEY}"},
            trust_env=False,
            timeout=PATIENCE_S,
        ) as client,
    ):
        yield Deployment(server, client, folder / "kept")


HEADROOM = 'vllm_sarathi_headroom_tokens_per_second{{engine="{rank}"}}'
GAPS = 'vllm_sarathi_gaps_total{{engine="{rank}",slo_class="default"}}'
RANKS = ("0", "1")
SLO_METRICS = (("gaps", "time_between_tokens"), ("first_tokens", "time_to_first_token"))


def test_every_api_server_shows_the_engines_figures(deployment: Deployment) -> None:
    deployment.wait_for_headroom()
    log = deployment.server.log_path.read_text()
    assert all(f"(ApiServer_{i} " in log for i in range(2))
    counts = [deployment.figures() for _ in range(16)]
    for before, after in itertools.pairwise(counts):
        counted = {name for name in before if re.search(r"_(total|bucket|sum|count)\{", name)}
        assert counted <= set(after)  # what is of the last ten seconds ends when nothing has run for so long
        for rank in RANKS:
            assert 0 < before[GAPS.format(rank=rank)] <= after[GAPS.format(rank=rank)]
    last = counts[-1]
    for rank, (suffix, ratio) in itertools.product(RANKS, SLO_METRICS):
        name = f"vllm_sarathi_{ratio}_slo_ratio_bucket"
        total = last[f'vllm_sarathi_{suffix}_total{{engine="{rank}",slo_class="default"}}']
        kept = last[f'vllm_sarathi_{suffix}_kept_total{{engine="{rank}",slo_class="default"}}']
        assert last[f'{name}{{engine="{rank}",le="+Inf",slo_class="default"}}'] == total > 0
        assert last[f'{name}{{engine="{rank}",le="1.0",slo_class="default"}}'] == kept > 0
        assert last[HEADROOM.format(rank=rank)] > 0
        assert last[f'vllm_sarathi_tbt_slo_seconds{{engine="{rank}"}}'] == 0.5
        assert last[f'vllm_sarathi_faults_total{{engine="{rank}"}}'] == 0


def test_a_response_holds_vllms_own_figures(deployment: Deployment) -> None:
    assert deployment.generate()["metrics"]["mean_itl_ms"] > 0


def test_top_in_json(deployment: Deployment) -> None:
    deployment.wait_for_headroom()
    done = CliRunner().invoke(app, ["top", deployment.server.base_url, "--once", "--json"])
    assert done.exit_code == 0, done.output
    engine = json.loads(done.stdout)["engines"]["0"]
    assert engine["tbt_slo_s"] == 0.5
    assert engine["classes"]["default"]["gaps"]["kept_since_start"] > 0
    assert engine["kv_cache_usage"] is not None


# Prometheus itself.


@pytest.fixture
def prometheus(deployment: Deployment, tmp_path: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server every second, with the rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    target = deployment.server.base_url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("wb"),
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False, timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ask(prometheus: httpx.Client, query: str) -> list[Any]:
    answer = prometheus.get("/query", params={"query": query})
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return answer.json()["data"]["result"]


def test_every_query_is_answered_by_a_real_prometheus(
    deployment: Deployment, prometheus: httpx.Client
) -> None:
    deployment.wait_for_headroom()
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        deployment.load(8)
    boards = [q for queries in grafana_queries().values() for q in queries]
    for query in [*boards, *keda_queries()]:
        query = query.replace("$instance", ".*").replace("$__rate_interval", "15s")
        result = ask(prometheus, query)
        assert result, f"nothing for {query}"
        assert all(row["value"][1] != "NaN" for row in result), f"{query}: {result}"
    recorded = ask(prometheus, "sarathi:gaps_missed:ratio_rate5m")
    assert [row["metric"]["slo_class"] for row in recorded] == ["default"]
    groups = prometheus.get("/rules").json()["data"]["groups"]
    assert [r["name"] for g in groups for r in g["rules"] if r["health"] != "ok"] == []
    assert sum(len(group["rules"]) for group in groups) == 9


def test_both_engines_keep_what_they_learn_in_one_file_that_is_always_whole(deployment: Deployment) -> None:
    deadline_s, kept = time.monotonic() + PATIENCE_S, set[Any]()
    while len(kept) < 3:  # each engine writes it anew every ten seconds
        assert time.monotonic() < deadline_s, f"written {len(kept)} times"
        deployment.load(8)
        for path in deployment.calibrations.glob("*.json"):
            kept.add((path.name, json.dumps(json.loads(path.read_text())["model"])))
    assert len({name for name, _ in kept}) == 1


# Control.


def test_control_is_behind_the_servers_key(deployment: Deployment) -> None:
    for method, path in (
        ("GET", ""),
        ("PATCH", ""),
        ("POST", "/step_trace/start"),
        ("GET", "/when_first_token"),
    ):
        url = f"{deployment.server.base_url}/v1/sarathi{path}"
        assert httpx.request(method, url, trust_env=False, timeout=30).status_code == 401


def test_an_slo_is_changed_under_load_and_no_request_is_lost(deployment: Deployment) -> None:
    client = deployment.client
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(deployment.generate, seed=i, temperature=0) for i in range(40)]
        for slo_ms in (400, 300, 450):
            said = client.patch("/v1/sarathi", json={"tbt_slo_ms": slo_ms})
            assert said.status_code == 200, said.text
            engines = said.json()["engines"]
            assert [each["rank"] for each in engines] == [0, 1]
            assert [each["changed"]["tbt_slo_ms"]["new"] for each in engines] == [slo_ms, slo_ms]
        assert client.patch("/v1/sarathi", json={"scheduler": "orca", "tbt_slo_ms": None}).status_code == 200
        back = {"scheduler": "sarathi", "tbt_slo_ms": 500}
        assert client.patch("/v1/sarathi", json=back).status_code == 200
        texts = {answer.result()["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1  # each the same, whoever scheduled it
    log = deployment.server.log_path.read_text()
    assert "Changed while serving: --tbt-slo-ms is 400 now, and was 500." in log
    for state in client.get("/v1/sarathi").json()["engines"]:
        assert state["settings"]["tbt_slo_ms"] == 500
        assert state["faults"] == 0
        assert state["step_model"]["ready"] is True


def test_what_is_wrong_is_refused_by_the_sentence_of_the_settings(deployment: Deployment) -> None:
    said = deployment.client.patch("/v1/sarathi", json={"tbt_slo_ms": -5})
    assert said.status_code == 400
    assert said.json()["error"] == "--tbt-slo-ms -5: must be a number of milliseconds from 0.1 to 3,600,000."


def test_a_step_trace_is_started_and_stopped(deployment: Deployment) -> None:
    started = deployment.client.post("/v1/sarathi/step_trace/start").json()["engines"]
    deployment.load(4)
    time.sleep(1.5)  # the thread that writes it looks once a second
    stopped = deployment.client.post("/v1/sarathi/step_trace/stop").json()["engines"]
    assert [each["step_trace"] for each in stopped] == [None, None]
    paths = {Path(each["step_trace"]) for each in started}
    assert len(paths) == 2
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    assert len(lines) >= 24
    assert all(json.loads(line)["slo_s"] == 0.5 for line in lines)


def test_a_router_may_ask_when_the_first_token_would_come(deployment: Deployment) -> None:
    query = {"tokens": 100, "ttft_slo_ms": 60_000}
    said = deployment.client.get("/v1/sarathi/when_first_token", params=query).json()["engines"][0]
    assert 0 < said["wait_s"] < 60
    assert said["kept"] is True


def test_two_hundred_malformed_bodies_end_nothing(deployment: Deployment) -> None:
    chance = random.Random(200)
    for _ in range(200):
        path = chance.choice(["/v1/sarathi", "/v1/sarathi", "/v1/sarathi/when_first_token?tokens=x"])
        method = "PATCH" if path == "/v1/sarathi" else "GET"
        answer = deployment.client.request(method, path, content=malformed(chance))
        assert answer.status_code < 500, answer.text
    assert [each["faults"] for each in deployment.client.get("/v1/sarathi").json()["engines"]] == [0, 0]
    deployment.load(4)
    log = deployment.server.log_path.read_text()
    assert "Traceback" not in log
