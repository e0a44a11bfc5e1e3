"""A `vllm serve` of our own: started on loopback, awaited, and stopped by its process id whatever happens.

The server runs in a process group of its own, so that Ctrl-C reaches us alone and we decide in which order
things end, and so that its engine core and workers can be ended with it. Only that group is ever signalled.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

SERVED_NAME = "demo"
MAX_NUM_SEQS = 32
MAX_MODEL_LEN = 4096
KV_CACHE_GIB = 2

# Identical for all servers that are compared, but for the scheduler.
SERVER_FLAGS = (
    f"--served-model-name={SERVED_NAME}",
    "--dtype=bfloat16",
    "--enforce-eager",
    f"--max-model-len={MAX_MODEL_LEN}",
    f"--max-num-seqs={MAX_NUM_SEQS}",
    # With it, a prompt that starts like an earlier one is partly free, and that would be compared instead.
    "--no-enable-prefix-caching",
    "--seed=0",
    "--disable-uvicorn-access-log",
)
_SERVER_ENV = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

_POLL_S = 0.2
_LOG_TAIL_LINES = 25


class ServerError(RuntimeError):
    """The server died or did not become ready in time; the message ends with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    base_url: str
    pid: int
    log_path: Path
    startup_s: float


def server_env(model: str) -> dict[str, str]:
    """What servers that are compared have in their environment, beside ours."""
    # All of a folder is here: do not wait for a hub that may be out of reach.
    return {**_SERVER_ENV, **({"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {})}


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_command(*subcommand: str) -> list[str]:
    """`vllm` as installed beside the running Python, or as found on the PATH, and its subcommand."""
    beside = Path(sys.executable).parent / "vllm"
    return [str(beside) if beside.exists() else "vllm", *subcommand]


@contextmanager
def serve(
    model: str,
    flags: Sequence[str] = (),
    *,
    log_path: Path,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    ready_timeout_s: float = 600.0,
    grace_s: float = 15.0,
    while_waiting: Callable[[float], None] | None = None,
) -> Iterator[Server]:
    """Run `vllm serve model flags` for the length of the block.

    `port` is a free one by default; `env` is added to our own environment; `command` replaces `vllm serve`;
    `while_waiting` is called with the seconds waited so far. The server is ended when the block ends, by an error,
    by Ctrl-C or by a SIGTERM to us just the same: SIGTERM first, SIGKILL for what is left of its group after
    `grace_s`.

    Raises ServerError when the server dies or is not ready after `ready_timeout_s`.
    """
    port = free_port() if port is None else port
    arguments = [
        *(command or vllm_command("serve")),
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *flags,
    ]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    process: subprocess.Popen[bytes] | None = None
    with _deadly_signals_unwind(), log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
            base_url = f"http://127.0.0.1:{port}"
            startup_s = _await_ready(process.pid, base_url, log_path, ready_timeout_s, while_waiting)
            yield Server(base_url, process.pid, log_path, startup_s)
        finally:
            if process is not None:
                stop(process, grace_s)


@contextmanager
def _deadly_signals_unwind() -> Iterator[None]:
    """Make SIGTERM and SIGHUP (a closed terminal) raise, so that `finally` runs; by default they end us on the spot.

    A handler that somebody has installed stays, and so does `nohup`.
    """

    def unwind(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    # Only the main thread may install handlers; whoever runs us elsewhere looks after the signals.
    ours = threading.current_thread() is threading.main_thread()
    changed = [s for s in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(s) is signal.SIG_DFL]
    for signum in changed:
        signal.signal(signum, unwind)
    try:
        yield
    finally:
        for signum in changed:
            signal.signal(signum, signal.SIG_DFL)


def _await_ready(
    pid: int, base_url: str, log_path: Path, timeout_s: float, while_waiting: Callable[[float], None] | None
) -> float:
    """Seconds until /health answered 200."""
    started = time.monotonic()
    with httpx.Client(base_url=base_url, trust_env=False, timeout=5.0) as client:  # no proxy to loopback
        while (waited_s := time.monotonic() - started) < timeout_s:
            if has_ended(pid):
                raise ServerError(f"the server died while starting\n{log_tail(log_path)}")
            with suppress(httpx.TransportError):
                if client.get("/health").status_code == httpx.codes.OK:
                    return waited_s
            if while_waiting is not None:
                while_waiting(waited_s)
            time.sleep(_POLL_S)
    raise ServerError(f"the server was not ready after {timeout_s:g} s\n{log_tail(log_path)}")


def has_ended(pid: int) -> bool:
    """Whether our child has ended. It is not reaped: until then neither its id nor its group's is reused."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def stop(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """End a child with a group of its own politely, then what is left of the group.

    Another Ctrl-C only cuts the grace short.
    """
    try:
        os.kill(process.pid, signal.SIGTERM)  # not terminate(): that would reap a child that has ended
        deadline = time.monotonic() + grace_s
        while not has_ended(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_tail(log_path: Path, lines: int = _LOG_TAIL_LINES) -> str:
    """The last lines of a log, under a heading that says where the rest is."""
    text = log_path.read_text(errors="replace").splitlines()
    return "\n".join([f"the end of {log_path}:", *text[-lines:]])
