"""The load on a live server: `vllm bench serve` as a process of its own, and what it saw of each request.

No warm-up and no ready check: the first request that the server sees is the first that counts.
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from vllm_sarathi.benchmark.live.arrivals import Arrival, draw_arrivals, trace_lines
from vllm_sarathi.benchmark.live.server import SERVED_NAME, has_ended, log_tail, stop, vllm_command
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord
from vllm_sarathi.simulation.workloads.live import LiveWorkload

SEED = 0
PATIENCE_S = 600.0
"""How much longer than the arrivals a load may take before it is given up."""

_POLL_S = 0.2


@dataclass(frozen=True)
class Load:
    """A workload drawn and written down: the same requests at the same times for every scheduler.

    Attributes:
        name: of the workload.
        model: as the client names it.
        arrivals: the requests, the first at 0 s.
        trace: the file that the client reads.
        seed: what the words of the prompts are drawn from.
    """

    name: str
    model: str
    arrivals: tuple[Arrival, ...]
    trace: Path
    seed: int = SEED

    @property
    def duration_s(self) -> float:
        """Seconds over which the requests arrive."""
        return self.arrivals[-1].at_s

    @property
    def fingerprint(self) -> str:
        """Tells runs of this load from runs of another: of the requests, their times and the model."""
        return hashlib.sha256(f"{self.seed} {self.model}\n{trace_lines(self.arrivals)}".encode()).hexdigest()[
            :16
        ]


def prepare(workload: LiveWorkload, model: str, folder: Path, seed: int = SEED) -> Load:
    """Draw the workload's requests, into a file in `folder`."""
    return write_load(workload.name, draw_arrivals(workload, seed), model, folder, seed)


def write_load(name: str, arrivals: Sequence[Arrival], model: str, folder: Path, seed: int = SEED) -> Load:
    """Return requests as a load, written into a file in `folder`."""
    trace = folder / f"{name}.trace.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    trace.write_text(trace_lines(arrivals))
    return Load(name, model, tuple(arrivals), trace, seed)


def client_flags(
    load: Load, base_url: str, result: Path, metadata: Mapping[str, str], served_name: str = SERVED_NAME
) -> list[str]:
    """The flags of `vllm bench serve` that send `load` and write `result`."""
    return [
        *("--backend", "openai", "--base-url", base_url, "--endpoint", "/v1/completions"),
        *("--model", load.model, "--served-model-name", served_name),
        *("--dataset-name", "timed_trace", "--dataset-path", str(load.trace)),
        # A prompt is one block of words of its own.
        *("--timed-trace-chunk-hash-size", str(1 + max(each.prompt_tokens for each in load.arrivals))),
        *("--num-prompts", str(len(load.arrivals)), "--seed", str(load.seed), "--temperature", "0"),
        *("--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
        *("--metadata", *(f"{key}={value}" for key, value in metadata.items())),
    ]


def send(
    load: Load,
    base_url: str,
    result: Path,
    *,
    env: Mapping[str, str],
    metadata: Mapping[str, str],
    served_name: str = SERVED_NAME,
    while_running: Callable[[float], None] | None = None,
) -> None:
    """Send the load to a server, and leave what `vllm bench serve` saw in `result`.

    `served_name` is the server's name for the model; `while_running` is called with the seconds since the last
    call. The client is ended by its process id when we are interrupted.

    Raises:
        RuntimeError: the client failed, or was not done PATIENCE_S after the last arrival.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    log_path = result.with_suffix(".client.log")
    scratch = result.with_suffix(".part")  # `result` is there only when it is whole
    client_env = {
        **os.environ,
        **env,
        "NO_PROXY": "127.0.0.1",  # no proxy is asked for the way to loopback
        "no_proxy": "127.0.0.1",
        "PYTHONHASHSEED": str(load.seed),  # the words of the prompts are drawn by Python's hash
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*vllm_command("bench", "serve"), *client_flags(load, base_url, scratch, metadata, served_name)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=client_env,
            start_new_session=True,
        )
        try:
            started_s = now_s = time.monotonic()
            while not has_ended(process.pid):
                if now_s - started_s > load.duration_s + PATIENCE_S:
                    raise RuntimeError(f"the load did not finish in time\n{log_tail(log_path)}")
                time.sleep(_POLL_S)
                before_s, now_s = now_s, time.monotonic()
                if while_running is not None:
                    while_running(now_s - before_s)
        finally:
            stop(process, grace_s=5.0)
    if process.returncode != 0 or not scratch.exists():
        raise RuntimeError(f"`vllm bench serve` failed\n{log_tail(log_path)}")
    scratch.replace(result)


def read_result(result: Path, load: Load) -> list[StreamRecord]:
    """Return what became of each request of `load`, in the order of arrival."""
    seen: dict[str, Any] = json.loads(result.read_text())
    first_s = min(seen["start_times"])
    return [
        _record(
            f"{load.name} {number}",
            arrival,
            seen["start_times"][number] - first_s,
            seen["ttfts"][number],
            seen["itls"][number],
            seen["output_lens"][number],
            seen["errors"][number],
        )
        for number, arrival in enumerate(load.arrivals)
    ]


def _record(
    name: str,
    arrival: Arrival,
    sent_s: float,
    ttft_s: float,
    gaps_s: list[float],
    output_tokens: int,
    error: str,
) -> StreamRecord:
    # A request to which nothing came has a time to first token of 0 in the file.
    times_s = list(accumulate(gaps_s, initial=sent_s + ttft_s)) if ttft_s > 0 else []
    if not error and output_tokens != arrival.output_tokens:
        error = f"{output_tokens} tokens came instead of {arrival.output_tokens}"
    return StreamRecord(
        name=name,
        sent_s=sent_s,
        deliveries=tuple(Delivery(at_s, 1) for at_s in times_s),
        text="",
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=output_tokens or len(times_s),
        error=error or None,
    )


def is_result_of(result: Path, metadata: Mapping[str, str]) -> bool:
    """True where `result` is a finished run that was sent with this metadata."""
    try:
        seen = json.loads(result.read_text())
    except (OSError, ValueError):
        return False
    return all(seen.get(key) == value for key, value in metadata.items())
