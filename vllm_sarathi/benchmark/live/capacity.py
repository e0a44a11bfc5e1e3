"""The capacity search on a server that runs: rates are tried by `vllm bench serve`, and judged as in a simulation.

The client cannot see how long a request waited until its first token of prompt was scheduled. vLLM's own `/metrics`
tells it: the histogram of queue times, before and after the run. A server without it is judged by the median time to
first token instead, which is never shorter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from vllm_sarathi.benchmark.capacity.search import Criterion, Found, capacity_row, check_search, search
from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live.arrivals import draw_arrivals
from vllm_sarathi.benchmark.live.load import Load, read_result, send, write_load
from vllm_sarathi.benchmark.live.measures import summarise_streams
from vllm_sarathi.benchmark.live.server import server_env
from vllm_sarathi.benchmark.live.streams import StreamRecord
from vllm_sarathi.core.config import ConfigError, check_positive
from vllm_sarathi.simulation.workloads.live import LiveWorkload
from vllm_sarathi.simulation.workloads.registry import live_named

QUEUE_TIME = re.compile(r'^vllm:request_queue_time_seconds_bucket\{.*\ble="([^"]+)".*\} (\S+)$', re.MULTILINE)
TIMEOUT_S = 30.0

LIVE_TOLERANCE = 0.1
"""A run takes a minute or more: the search ends where the failing rate is a tenth above the passing one."""

LIVE_RATE_RANGE = (1 / 16, 16.0)


@dataclass(frozen=True)
class LiveAsked:
    """What is searched.

    Attributes:
        url: of the server, without `/v1`.
        model: what the client's tokenizer is read from: a folder, or a name on a model hub.
        workload: what is sent; its rate is the first that is tried.
        criterion: when a run counts as carried.
        scheduler: what rows call the server's scheduler.
        seeds: how many searches, each with other requests.
        out: where data sets, clients' results and logs go.
    """

    url: str
    model: str
    workload: LiveWorkload
    criterion: Criterion
    scheduler: str
    seeds: int
    out: Path


def parse_live(
    *,
    url: str | None,
    model: str,
    workload: str,
    tbt_slo_ms: float | None,
    max_delay_s: float,
    scheduler: str,
    requests: int | None,
    rate_qps: float | None,
    seeds: int,
    out: Path,
) -> LiveAsked:
    """Check what the user asked for.

    Raises:
        ConfigError: no URL, an unknown workload, or a value out of range.
    """
    if url is None or not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"--url {url!r}: --capacity needs the server's address, as in http://127.0.0.1:8000."
        )
    known = live_named(workload)
    criterion = Criterion(tbt_slo_ms, max_delay_s=max_delay_s)
    check_search(known.requests if requests is None else requests, seeds, criterion)
    if rate_qps is not None:
        check_positive("rate", rate_qps, 1e6)
    wanted = replace(known, requests=requests or known.requests, rate_per_s=rate_qps or known.rate_per_s)
    return LiveAsked(url.rstrip("/").removesuffix("/v1"), model, wanted, criterion, scheduler, seeds, out)


def find_live(asked: LiveAsked, console: Console) -> dict[str, Any]:
    """Search the capacity of a running server, and return the row, of the same fields as `capacity` gives.

    Raises:
        RuntimeError: the server does not answer, or a client failed.
    """
    served_name = _served_name(asked.url)
    with Stages(console) as stages:
        found = [_search(asked, served_name, seed, stages) for seed in range(asked.seeds)]
    name, slo_ms = asked.workload.name, asked.criterion.tbt_slo_ms
    return capacity_row(asked.url, name, slo_ms, asked.scheduler, found, tolerance=LIVE_TOLERANCE)


def _search(asked: LiveAsked, served_name: str, seed: int, stages: Stages) -> Found:
    figures: dict[float, dict[str, Any]] = {}

    def run(rate_qps: float) -> bool:
        name = f"{asked.workload.name}-{rate_qps:.4g}-{seed}"
        arrivals = draw_arrivals(replace(asked.workload, rate_per_s=rate_qps), seed)
        load = write_load(name, arrivals, asked.model, asked.out, seed)
        stages.begin(f"{rate_qps:.3g} requests/s, {len(arrivals)} requests", total=load.duration_s)
        records, delay_s = _send(asked, load, served_name, stages)
        figures[rate_qps] = summarise_streams(records)
        return carries(asked.criterion, records, delay_s)

    qps = search(run, asked.workload.rate_per_s, LIVE_TOLERANCE, LIVE_RATE_RANGE)
    return Found(qps, figures[min(figures) if qps is None else qps], len(figures))


def _send(
    asked: LiveAsked, load: Load, served_name: str, stages: Stages
) -> tuple[list[StreamRecord], float | None]:
    """Send a load; return what became of each request, and the median queueing delay where the server tells it."""
    result = asked.out / f"{load.name}.json"
    before = queue_times(_metrics(asked.url))
    send(
        load,
        asked.url,
        result,
        env=server_env(asked.model),
        metadata={},
        served_name=served_name,
        while_running=stages.advance,
    )
    after = queue_times(_metrics(asked.url))
    return read_result(result, load), median_between(before, after)


def carries(criterion: Criterion, records: Sequence[StreamRecord], delay_s: float | None) -> bool:
    """Return whether a live run meets the criterion; one in which a request failed does not."""
    if any(record.error is not None or record.ttft_s is None for record in records):
        return False
    if delay_s is None:
        delay_s = float(np.median([record.ttft_s for record in records if record.ttft_s is not None]))
    gaps_s = [gap for record in records for gap in record.gaps_s]
    if delay_s > criterion.max_delay_s:
        return False
    if criterion.tbt_slo_ms is None or not gaps_s:
        return True
    return bool(np.percentile(gaps_s, criterion.percentile) * 1e3 <= criterion.tbt_slo_ms)


def queue_times(metrics: str) -> dict[float, float]:
    """Return the histogram of queue times in vLLM's metrics: requests of all engines up to each bound, seconds."""
    counts: dict[float, float] = {}
    for bound, count in QUEUE_TIME.findall(metrics):
        counts[float(bound)] = counts.get(float(bound), 0.0) + float(count)
    return counts


def median_between(before: dict[float, float], after: dict[float, float]) -> float | None:
    """Return the median of what a histogram gained, interpolated in its bucket; None where it gained nothing."""
    bounds = sorted(after)
    gained = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    if not gained or gained[-1] <= 0:
        return None
    half, low, below = gained[-1] / 2, 0.0, 0.0
    for bound, count in zip(bounds, gained, strict=True):
        if count >= half:
            return bound if bound == float("inf") else low + (bound - low) * (half - below) / (count - below)
        low, below = bound, count
    raise AssertionError("the last bucket holds everything")


def _get(url: str, path: str) -> httpx.Response:
    try:
        return httpx.get(url + path, timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as error:
        raise RuntimeError(f"--url {url}: does not answer ({error})") from error


def _metrics(url: str) -> str:
    answer = _get(url, "/metrics")
    return answer.text if answer.status_code == httpx.codes.OK else ""


def _served_name(url: str) -> str:
    answer = _get(url, "/v1/models")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"--url {url}: is not a model server (HTTP {answer.status_code})") from error
