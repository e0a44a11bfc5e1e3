"""The server's life: started, awaited, stopped by its id, whatever happens to us."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.benchmark.fake_vllm import FAKE
from vllm_sarathi.benchmark.live.server import ServerError, serve


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    """Fail if one of them is still there after a while; end what is left, so that a failed test leaves nothing."""
    deadline = time.monotonic() + 30
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"still running: {left}"


def test_it_serves_with_our_flags_and_environment_and_is_gone_afterwards(tmp_path: Path) -> None:
    waits: list[float] = []
    log = tmp_path / "server.log"
    with serve(
        "some/model",
        ["--scheduler", "default"],
        log_path=log,
        env={"FAKE_START_S": "0.5"},
        command=FAKE,
        while_waiting=waits.append,
    ) as server:
        assert httpx.get(f"{server.base_url}/health", trust_env=False).status_code == 200
        assert is_running(server.pid)
    assert not is_running(server.pid)
    assert waits == sorted(waits)
    assert waits, "nothing was said while waiting"
    assert log.read_text().startswith("arguments: some/model --host 127.0.0.1 --port ")
    assert log.read_text().splitlines()[0].endswith("--scheduler default")


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="no such flag: --nonsense"),
        serve("m", log_path=tmp_path / "log", env={"FAKE_DIE": "no such flag: --nonsense"}, command=FAKE),
    ):
        pytest.fail("a dead server was handed out")


def test_a_server_that_never_gets_ready_is_stopped_and_reported(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    env = {"FAKE_START_S": "1e9", "FAKE_PIDS": str(pids)}
    with (
        pytest.raises(ServerError, match="not ready after 3 s"),
        serve("m", log_path=tmp_path / "log", env=env, command=FAKE, ready_timeout_s=3.0),
    ):
        pytest.fail("a server that is not ready was handed out")
    wait_until_gone(json.loads(pids.read_text()))


def test_an_error_in_the_block_stops_the_server_and_comes_through(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        serve("m", log_path=tmp_path / "log", command=FAKE) as server,
    ):
        _ = 1 / 0
    assert not is_running(server.pid)


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    env = {"FAKE_STUBBORN": "1", "FAKE_PIDS": str(pids)}
    with serve("m", log_path=tmp_path / "log", env=env, command=FAKE, grace_s=0.3):
        family = json.loads(pids.read_text())
        assert len(family) == 2
        assert all(is_running(pid) for pid in family)
    wait_until_gone(family)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_us_stops_the_server(tmp_path: Path, signum: signal.Signals) -> None:
    pids = tmp_path / "pids"
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from vllm_sarathi.benchmark.live.server import serve\n"
        # A parent that runs in the background, or under nohup, hands its ignored signals down.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with serve('m', log_path=Path(sys.argv[1]), command=sys.argv[2:]):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    us = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log"), *FAKE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FAKE_PIDS": str(pids)},
    )
    try:
        assert us.stdout is not None
        assert us.stdout.readline() == b"up\n"
        family = json.loads(pids.read_text())
        assert all(is_running(pid) for pid in family)
        us.send_signal(signum)
        assert us.wait(timeout=60) != 0
        wait_until_gone(family)
    finally:
        us.kill()
        us.wait()
