"""A soak of a real `vllm serve`, cut down; `make soak` runs the whole: SOAK_SERVER_REQUESTS=2000, SOAK_S=3600.

The tiny model with a class file, few KV blocks (preemptions), a calibration folder that cannot be written, and a step
trace on a full disk. Processes are stopped and ended by the ids that the server was started with.
"""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.operations.test_served import ROOT, write_entry_points
from tests.soak.clients import MAX_MODEL_LEN, run
from tests.soak.lives import resident_mib
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.server import Server, has_ended, serve

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

REQUESTS = int(os.environ.get("SOAK_SERVER_REQUESTS", "160"))
SECONDS = float(os.environ.get("SOAK_S", "0"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
MODEL = os.environ.get("SOAK_MODEL")
"""The folder of a model to serve in place of the tiny one."""

AT_ONCE = 24
STOPPED_S = 3.0
END_S = 60.0
MOST_GROWTH_MIB = 150.0
"""By how much the two processes may grow from the first quarter of the requests to the last."""

CLASSES = """
default: standard
classes:
  interactive: {ttft_slo_ms: 1500, tbt_slo_ms: 500, when_late: refuse, service_tiers: [priority]}
  standard: {ttft_slo_ms: 60000, tbt_slo_ms: 2000, when_late: relegate}
  night: {batch: true, max_wait_s: 20, service_tiers: [flex]}
"""
FLAGS = ["--served-model-name=tiny", "--dtype=float32", "--enforce-eager", f"--max-model-len={MAX_MODEL_LEN}"]
FLAGS += ["--seed=0", "--block-size=32", "--num-gpu-blocks-override=40", "--disable-uvicorn-access-log"]
FLAGS += ["--gpu-memory-utilization=0.2"]  # other processes may have the rest
FLAGS += ["--calibration-dir=/proc/no-such-folder", "--step-trace=/dev/full"]


@contextmanager
def soaked_server(folder: Path, *extra: str, port: int | None = None) -> Iterator[Server]:
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_PLUGINS": "sarathi,sarathi_control",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(folder),
    }
    flags = [*FLAGS, *extra, "--slo-classes", str(folder / "classes.yaml")]
    log = folder / f"server-{time.monotonic_ns()}.log"
    with serve(MODEL or str(folder / "tiny"), flags, log_path=log, port=port, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("soak")
    tiny_model(made / "tiny")
    (made / "classes.yaml").write_text(CLASSES)
    write_entry_points(made)
    return made


def engine_of(server: Server) -> psutil.Process:
    """Return the engine core's process."""
    children = psutil.Process(server.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def held_mib(server: Server) -> float:
    return resident_mib(server.pid) + resident_mib(engine_of(server).pid)


def check_rest(server: Server) -> dict[str, Any]:
    """Wait until nobody is left, and check that nothing is held and nothing has gone wrong."""
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=60) as client:
        deadline_s = time.monotonic() + END_S
        while True:
            state = client.get("/v1/sarathi").json()["engines"][0]
            page = client.get("/metrics").text
            held = float(re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", page, re.M)[0])
            if not (state["running"] or sum(state["waiting"].values()) or held):
                break
            assert time.monotonic() < deadline_s, f"held: {held}, {state}"
            time.sleep(0.5)
        assert state["faults"] == 0
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 3})
        assert answer.status_code == 200
    assert "Traceback" not in server.log_path.read_text()
    return state


def test_everybody_is_answered_and_nothing_is_held(folder: Path) -> None:
    became: Counter[str] = Counter()
    with soaked_server(folder) as server:
        engine = engine_of(server)
        started_s, seed, early_mib = time.monotonic(), SEED, 0.0

        async def stop_for_a_while() -> None:
            for process in (engine, psutil.Process(server.pid)):
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(STOPPED_S)
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(STOPPED_S / 3)

        while sum(became.values()) < REQUESTS or time.monotonic() - started_s < SECONDS:
            lot = min(500, REQUESTS)
            stopping = stop_for_a_while if seed == SEED else None
            told = asyncio.run(run(server.base_url, lot, seed, AT_ONCE, stopping))
            assert not told["cut off"], told  # a server that stands still for a while cuts nobody off
            became, seed = became + told, seed + 1
            early_mib = early_mib or held_mib(server)
        check_rest(server)
        growth_mib = held_mib(server) - early_mib
        page = httpx.get(server.base_url + "/metrics", trust_env=False).text
    print(dict(became), f"{growth_mib:.0f} MiB", kept(page))
    assert {"200", "left", "400"} <= set(became)
    assert growth_mib <= MOST_GROWTH_MIB


def kept(page: str) -> dict[str, tuple[float, float]]:
    """Return first tokens, and those in time, by class."""
    found = re.findall(r'^vllm_sarathi_first_tokens(_kept)?_total\{.*slo_class="(\w+)"\} (\S+)$', page, re.M)
    counts = {(name, bool(in_time)): float(value) for in_time, name, value in found}
    return {name: (counts[name, True], total) for (name, in_time), total in counts.items() if not in_time}


@pytest.mark.skipif(REQUESTS < 1000, reason="six starts of a server: a part of make soak")
@pytest.mark.parametrize("killed", ["engine", "api server", "one of two api servers"])
def test_who_is_killed_leaves_nobody_waiting_and_a_new_one_serves(folder: Path, killed: str) -> None:
    """As stock vLLM does: clients get an error, all ends, and who is started again on the port serves.

    Only an engine core whose sole API server is killed stays behind: nobody is left there to end it.
    """
    extra = ("--api-server-count=2",) if killed == "one of two api servers" else ()
    with soaked_server(folder, *extra) as server:
        family = psutil.Process(server.pid).children(recursive=True)
        victim = {
            "engine": lambda: engine_of(server),
            "api server": lambda: psutil.Process(server.pid),
            "one of two api servers": lambda: next(p for p in family if "APIServer" in "".join(p.cmdline())),
        }[killed]()

        async def kill() -> None:
            victim.kill()

        became = asyncio.run(run(server.base_url, REQUESTS // 10, SEED + 99, AT_ONCE, kill))
        assert became["cut off"] > 0
        deadline_s = time.monotonic() + END_S
        while not has_ended(server.pid):
            assert time.monotonic() < deadline_s, "the server outlives what was killed"
            time.sleep(0.2)
        if killed != "api server":
            left = psutil.wait_procs(family, timeout=END_S)[1]
            assert not left, f"still there: {[each.cmdline() for each in left]}"
    print(killed, dict(became))
    port = httpx.URL(server.base_url).port
    with soaked_server(folder, port=port) as server:
        asyncio.run(run(server.base_url, REQUESTS // 20, SEED + 100, AT_ONCE))
        check_rest(server)
