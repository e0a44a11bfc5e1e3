"""The load that a plan is for: what is sent, the SLOs of each class, and whether a run met them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sarathi.benchmark.capacity.search import check_requests
from vllm_sarathi.benchmark.capacity.simulated import check_fit, rate_of
from vllm_sarathi.core.classes import SloClasses, read_classes
from vllm_sarathi.core.config import ConfigError, check_choice, check_positive, nearest_hint
from vllm_sarathi.simulation.outcome import meets_slos
from vllm_sarathi.simulation.simulator import RequestLog, Simulator
from vllm_sarathi.simulation.traces import DEFAULT_FORMAT, TOO_LONG, check_no_trace, read_trace
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest, at_rate, check_span

MAX_DELAY_S = 2.0
"""The longest median queueing delay where there is no SLO for the time to first token (the paper's criterion)."""

LONGEST_STEP = 1024
"""`--max-model-len` is a multiple of it, or what the model takes."""

LEAST_SPAN_S = 30.0
"""The least length of a run: a shorter one ends before the queue that it builds up is felt."""

MOST_REQUESTS = 6000
"""Requests of a run."""


@dataclass(frozen=True)
class Load:
    """What is sent, and within which SLOs.

    Attributes:
        name: of the workload, or of the trace's file.
        requests: as many as the longest run takes; their times are stretched to its rate.
        rate_qps: requests per second, of all replicas.
        attainment: the share of each class's requests that have to meet their SLOs.
        max_tokens: the longest request that the model takes.
        settings: those of SarathiConfig, for `sarathi`.
        least: requests of a run.
        seed: of what scatters.
        skipped: requests that are longer than the model takes, and left out.
    """

    name: str
    requests: tuple[SimulatedRequest, ...]
    rate_qps: float
    attainment: float
    max_tokens: int
    settings: tuple[tuple[str, Any], ...] = ()
    least: int = 0
    seed: int = 0
    skipped: int = 0

    @property
    def longest(self) -> int:
        """The longest request, rounded up to what the model takes at most, tokens."""
        most = max(r.prompt_tokens + r.output_tokens for r in self.requests)
        return min(-(-most // LONGEST_STEP) * LONGEST_STEP, self.max_tokens)

    @property
    def share_prefixes(self) -> bool:
        """Whether prefixes are shared."""
        return any(request.prefix for request in self.requests)

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output tokens per second, of all replicas."""
        tokens = sum(r.prompt_tokens + r.output_tokens for r in self.requests)
        return self.rate_qps * tokens / len(self.requests)

    @property
    def output_share(self) -> float:
        """The share of the tokens that are written."""
        written = sum(r.output_tokens for r in self.requests)
        return written / sum(r.prompt_tokens + r.output_tokens for r in self.requests)

    def at(self, rate_qps: float) -> list[SimulatedRequest]:
        """Return the requests of a run at a rate."""
        count = max(self.least, math.ceil(LEAST_SPAN_S * rate_qps))
        return at_rate(self.requests[:count], rate_qps)

    def kept(self, logs: Iterable[RequestLog]) -> bool:
        """Return whether a finished run met the SLOs."""
        every = list(logs)
        shares = kept_shares(every)
        if any(share < self.attainment for share in shares.values()):
            return False
        if any(log.request.ttft_slo_ms is not None for log in every):
            return True
        delays = [log.scheduled_s - log.request.arrival_s for log in every if log.scheduled_s is not None]
        return bool(np.median(delays) <= MAX_DELAY_S)


def kept_shares(logs: Iterable[RequestLog]) -> dict[str, float]:
    """Return the share of the requests that met their SLOs, for each class with an SLO."""
    kept: dict[str, list[bool]] = {}
    for log in logs:
        if (one := meets_slos(log)) is not None:
            kept.setdefault(log.request.kind, []).append(one)
    return {kind: sum(each) / len(each) for kind, each in kept.items()}


class Hopeless:
    """Ends a run in which too many requests of a class miss their SLOs, whatever comes."""

    def __init__(self, requests: Iterable[SimulatedRequest], attainment: float) -> None:
        self._left: dict[str, float] = {}
        for request in requests:
            if request.tbt_slo_ms is not None or request.ttft_slo_ms is not None:
                self._left[request.kind] = self._left.get(request.kind, 0.0) + 1 - attainment
        self._seen = 0

    def __call__(self, simulator: Simulator) -> bool:
        """Count what has finished since the last call, and the requests that are late already."""
        for log in simulator.finished[self._seen :]:
            if meets_slos(log) is False:
                self._left[log.request.kind] -= 1
        self._seen = len(simulator.finished)
        left = dict(self._left)
        for log in simulator.arrived():
            slo_ms = log.request.ttft_slo_ms
            if slo_ms is None or log.finished or log.refused:
                continue
            first_s = log.token_s[0] if log.token_s else simulator.now_s
            left[log.request.kind] -= (first_s - log.request.arrival_s) * 1e3 > slo_ms
        return min(left.values(), default=0.0) < -1e-9


@dataclass(frozen=True)
class LoadAsked:
    """What the command line says of the load.

    Attributes:
        workload, arrivals: as those of `simulate`.
        requests: of a run, at the least.
        trace, trace_format, time_scale: as `read_trace` takes them.
        too_long: what becomes of requests beyond the model's context, `refuse` or `skip`.
        rate_qps: requests per second; None for a trace's own.
        tbt_slo_ms, ttft_slo_ms: the SLOs of each request; None for none.
        slo_classes: a file with SLOs by class; None for none.
        attainment: the share of the requests that have to meet their SLOs.
    """

    workload: str = "chat"
    requests: int = 300
    arrivals: str = "poisson"
    trace: Path | None = None
    trace_format: str = DEFAULT_FORMAT
    time_scale: float = 1.0
    too_long: str = "refuse"
    rate_qps: float | None = None
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    slo_classes: Path | None = None
    attainment: float = 0.95


def load_of(asked: LoadAsked, max_tokens: int) -> Load:
    """Return the load that was asked for.

    Args:
        asked: what was said of it.
        max_tokens: the longest request that the model takes.

    Raises:
        ConfigError: an unknown name, a value out of range, no SLO, or requests that the model does not take.
    """
    check_requests(asked.requests, 20)
    for key in ("rate", "tbt_slo_ms", "ttft_slo_ms"):
        value = asked.rate_qps if key == "rate" else getattr(asked, key)
        if value is not None:
            check_positive(key, value, 3.6e6)
    if not 0 < asked.attainment < 1:
        raise ConfigError(f"--attainment {asked.attainment!r}: must be a share above 0 and below 1, as 0.95.")
    if asked.rate_qps is None and asked.trace is None:
        raise ConfigError(
            "--rate: is missing; give requests per second, or a --trace, which has its own rate."
        )
    sent, skipped = _sent(asked, max_tokens)
    settings, with_slos = _with_slos(asked, sent)
    name = asked.workload if asked.trace is None else asked.trace.name
    rate_qps = asked.rate_qps or rate_of(sent)
    if rate_qps is None:
        raise ConfigError(f"--rate: is missing; the requests of --trace {asked.trace} arrive all at once.")
    count = min(len(sent), asked.requests)
    check_span(rate_qps, count, (count - 1) / rate_qps)
    return Load(
        name,
        tuple(with_slos),
        rate_qps,
        asked.attainment,
        max_tokens,
        settings,
        asked.requests,
        skipped=skipped,
    )


def _sent(asked: LoadAsked, max_tokens: int) -> tuple[list[SimulatedRequest], int]:
    """Return the requests that the longest run takes, and how many are too long for the model and left out."""
    check_choice("too_long", asked.too_long, TOO_LONG)
    most = max(MOST_REQUESTS, asked.requests)
    if asked.trace is not None:
        read = read_trace(asked.trace, asked.trace_format, max_tokens, asked.too_long, asked.time_scale)
        if len(read.requests) < 2:
            raise ConfigError(f"--trace {asked.trace}: holds fewer than two requests.")
        return repeated(read.requests, most), read.skipped
    check_no_trace(asked.trace_format, asked.time_scale)
    every = synthetic(asked.workload, 1.0, most, 0, asked.arrivals)
    if asked.too_long == "refuse":
        check_fit(asked.workload, every, max_tokens)
    sent = [r for r in every if r.prompt_tokens + r.output_tokens <= max_tokens]
    if len(sent) < 2:
        raise ConfigError(
            f"--workload {asked.workload}: no two requests fit into the model's {max_tokens} tokens."
        )
    return sent, len(every) - len(sent)


def repeated(requests: Sequence[SimulatedRequest], count: int) -> list[SimulatedRequest]:
    """Return a number of requests of a trace, which begins again where it ends.

    A short one would be a burst. What comes again shares no prefixes with what came before, which it would all find
    cached.
    """
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    period_s = span_s * len(requests) / (len(requests) - 1)
    names = 1 + max((piece for request in requests for piece in request.prefix), default=0)
    turns = range(-(-count // len(requests)))
    return [
        replace(r, arrival_s=r.arrival_s + turn * period_s, prefix=tuple(p + turn * names for p in r.prefix))
        for turn in turns
        for r in requests
    ][:count]


Settings = tuple[tuple[str, Any], ...]


def _with_slos(asked: LoadAsked, sent: Sequence[SimulatedRequest]) -> tuple[Settings, list[SimulatedRequest]]:
    """Return the scheduler's settings, and the requests with their SLOs."""
    if asked.slo_classes is not None:
        if asked.tbt_slo_ms is not None or asked.ttft_slo_ms is not None:
            raise ConfigError("--slo-classes: states the SLOs; leave out --tbt-slo-ms and --ttft-slo-ms.")
        classes = read_classes(asked.slo_classes)
        return (("slo_classes", classes.to_mapping()),), [_in_class(request, classes) for request in sent]
    if asked.tbt_slo_ms is None and asked.ttft_slo_ms is None:
        if all(r.tbt_slo_ms is None and r.ttft_slo_ms is None for r in sent):
            raise ConfigError("plan: no SLO is stated; say --tbt-slo-ms, --ttft-slo-ms or --slo-classes.")
        own = (("allow_request_slo", True), ("prefill_order", "deadline"))
        return own, list(sent)
    settings: dict[str, Any] = {}
    if asked.tbt_slo_ms is not None:
        settings["tbt_slo_ms"] = asked.tbt_slo_ms
    if asked.ttft_slo_ms is not None:
        settings |= {"ttft_slo_ms": asked.ttft_slo_ms, "prefill_order": "deadline"}
    with_slos = [
        replace(r, tbt_slo_ms=asked.tbt_slo_ms, ttft_slo_ms=asked.ttft_slo_ms, kind="") for r in sent
    ]
    return tuple(settings.items()), with_slos


def _in_class(request: SimulatedRequest, classes: SloClasses) -> SimulatedRequest:
    found = classes.named(request.kind) if request.kind else classes.default_class
    if found is None:
        names = [each.name for each in classes.classes]
        raise ConfigError(
            f"{classes.origin}: the workload has requests of class {request.kind!r}, which it does not name; "
            f"{nearest_hint(request.kind, names)}"
        )
    blank: Mapping[str, Any] = {"tbt_slo_ms": None, "ttft_slo_ms": None}
    said = {} if found.batch else {"tbt_slo_ms": found.tbt_slo_ms, "ttft_slo_ms": found.ttft_slo_ms}
    return replace(request, kind=found.name, **{**blank, **said})
