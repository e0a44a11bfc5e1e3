"""`examples/ray_serve.py` on Ray itself: served, killed, back again, and as many replicas as the headroom asks for."""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from tests.operations.test_served import ROOT
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import free_port

pytest.importorskip("vllm")
pytest.importorskip("ray.serve.llm", reason="pip install 'ray[serve,llm]'", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

READY_S = 240.0
REPLICA, ENGINE = "ray::ServeReplica:default:SarathiServer", "EngineCore"


@dataclass
class RayServer:
    """The example as it runs."""

    process: psutil.Popen
    url: str
    log: Path

    def wait_for(self, text: str, times: int = 1) -> str:
        """Return the log once a text stands in it so often."""
        deadline_s = time.monotonic() + READY_S
        while (said := self.log.read_text()).count(text) < times:
            assert self.process.poll() is None, said[-3000:]
            assert time.monotonic() < deadline_s, f"no {text!r} in {said[-3000:]}"
            time.sleep(0.5)
        return said

    def ask(self, words: int = 8) -> httpx.Response:
        body = {"model": "chat", "prompt": "word " * words, "max_tokens": 12, "ignore_eos": True}
        return httpx.post(f"{self.url}/completions", json=body, trust_env=False, timeout=120)

    def answers(self) -> bool:
        """Return whether a request is answered."""
        try:
            return self.ask().status_code == 200
        except httpx.TransportError:
            return False

    def running(self, title: str) -> list[psutil.Process]:
        """Return the processes below it whose command line has a text in it."""
        found = []
        for each in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(each.cmdline()):
                    found.append(each)
        return found


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    folder = tmp_path_factory.mktemp("ray")
    tiny_model(folder / "tiny")
    port, log = free_port(), folder / "log"
    options = [f"--model={folder / 'tiny'}", f"--port={port}", "--cpus=1", "--max-replicas=2", "--full=0.001"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    command = [sys.executable, "examples/ray_serve.py", "--tbt-slo-ms=500", *options]
    with log.open("wb") as out:
        process = psutil.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    family: list[psutil.Process] = []
    try:
        server = RayServer(process, f"http://127.0.0.1:{port}/v1", log)
        server.wait_for("serving at")
        yield server
    finally:
        if process.is_running():
            family = process.children(recursive=True)
            process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs([process, *family], timeout=60)
        for each in left:
            each.kill()


@pytest.mark.parametrize(
    ("read", "headroom", "waiting", "wanted"),
    [
        ([900], [100], [0], 2),
        ([9000], [1], [0], 2),
        ([1], [999], [9], 1),
        ([], [], [], 1),
        ([], [], [3], 2),
    ],
)
def test_the_policy_stays_within_the_bounds_and_says_what_it_goes_by(
    monkeypatch: pytest.MonkeyPatch,
    read: list[int],
    headroom: list[int],
    waiting: list[int],
    wanted: int,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("ray.serve"), "info", lambda text, *args: said.append(text % args))
    told = {"read": read, "headroom": headroom, "waiting": waiting}
    context = SimpleNamespace(
        aggregated_metrics={name: dict(enumerate(values)) for name, values in told.items()},
        current_num_replicas=1,
        target_num_replicas=1,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=2,
        policy_state={},
    )
    policy = importlib.import_module("ray_serve").HeadroomPolicy(0.8)
    for _ in range(2):
        found, context.policy_state = policy(context)
        assert found == wanted
    assert said == [f"{wanted} replicas are wanted: {told}"]


def test_ray_serves_with_our_scheduler(ray_server: RayServer) -> None:
    answer = ray_server.ask()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 12
    assert "Using custom scheduler class vllm_sarathi.SarathiScheduler" in ray_server.log.read_text()


@pytest.mark.parametrize("killed", [REPLICA, ENGINE])
def test_what_is_killed_comes_back(ray_server: RayServer, killed: str) -> None:
    before = ray_server.running(killed)
    below = before[0].children(recursive=True)
    before[0].kill()
    deadline_s = time.monotonic() + READY_S
    while len(set(ray_server.running(killed)) - {before[0]}) < len(before) or not ray_server.answers():
        assert time.monotonic() < deadline_s, ray_server.log.read_text()[-3000:]
        time.sleep(1)
    left = psutil.wait_procs(below, timeout=30)[1]
    print(killed, "was killed; left behind:", [each.cmdline() for each in left])
    for each in left:  # nobody else would
        each.kill()


def test_a_second_replica_comes_where_the_headroom_is_used(ray_server: RayServer) -> None:
    def keep_asking(until: Any) -> None:
        while not until.done():
            assert ray_server.ask(60).status_code == 200

    with ThreadPoolExecutor(5) as pool:
        waiting = pool.submit(ray_server.wait_for, "-- 2 replicas are wanted: {'read': [")
        for each in [pool.submit(keep_asking, waiting) for _ in range(4)]:
            each.result()
    assert "'headroom': [0]" not in waiting.result()
    deadline_s = time.monotonic() + READY_S
    while len(ray_server.running(ENGINE)) < 2:
        assert time.monotonic() < deadline_s, ray_server.log.read_text()[-3000:]
        ray_server.ask(60)
