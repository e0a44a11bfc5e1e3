"""The highest rate at which a deployment keeps its SLO, by bracketing and bisection.

The criterion is the paper's (Sarathi-Serve, section 5, "Metrics"): P99 of the time between tokens within the SLO,
and a median queueing delay of at most two seconds. With SLOs of the requests' own, a second one: the share of
them that is kept (`goodput`).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm_sarathi.core.config import ConfigError, check_int, check_positive
from vllm_sarathi.core.spec import SchedulerSpec
from vllm_sarathi.simulation.deployment import build, deployment, enough_for, scheduler_choice
from vllm_sarathi.simulation.devices.disturbed import UNDISTURBED, Disturbance, disturbed
from vllm_sarathi.simulation.outcome import Outcome, meets_slos, outcome_of, paces
from vllm_sarathi.simulation.placement import Deployment
from vllm_sarathi.simulation.simulator import RequestLog, Simulator
from vllm_sarathi.simulation.workloads.registry import synthetic
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest, at_rate

BRACKET_FACTOR = 1.6
TOLERANCE = 0.02
"""The search ends where the lowest failing rate is above the highest passing one by this share."""

RATE_RANGE = (1 / 1024, 64.0)
"""Rates that are tried, as multiples of the first one."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """When a run counts as carried.

    Attributes:
        tbt_slo_ms: the SLO for the time between tokens; None for no SLO.
        tbt_mode: what it means: `gap`, or `pace` (token n by first token + n x SLO).
        percentile: which percentile of all gaps, or paces, has to keep it.
        max_delay_s: the longest median queueing delay, seconds.
        goodput: the share of the requests with SLOs of their own that has to keep them; None leaves them out.
    """

    tbt_slo_ms: float | None = None
    percentile: float = 99.0
    max_delay_s: float = 2.0
    goodput: float | None = None
    tbt_mode: str = "gap"

    def holds(self, outcome: Outcome) -> bool:
        """Return whether a finished run meets it."""
        if self.goodput is not None and (
            outcome.request_attainment is None or outcome.request_attainment < self.goodput
        ):
            return False
        if np.median(outcome.delays_s) > self.max_delay_s and self.goodput is None:
            return False
        times_s = outcome.paces_s if self.tbt_mode == "pace" else outcome.gaps_s
        if self.tbt_slo_ms is None or self.goodput is not None or not len(times_s):
            return True
        return bool(np.percentile(times_s, self.percentile) * 1e3 <= self.tbt_slo_ms)


class Watch:
    """Ends a run that can no longer meet the criterion, whatever comes; it never ends one that still can."""

    def __init__(self, criterion: Criterion, requests: Sequence[SimulatedRequest]) -> None:
        self._criterion = criterion
        gaps = sum(max(0, r.output_tokens - 1) for r in requests)
        with_slo = sum(r.tbt_slo_ms is not None or r.ttft_slo_ms is not None for r in requests)
        self._late_gaps_left = (1 - criterion.percentile / 100) * gaps + 1
        self._delayed_left = len(requests) / 2 + 1
        self._broken_left = (1 - (criterion.goodput or 0)) * with_slo
        self._seen = 0

    def __call__(self, simulator: Simulator) -> bool:
        """Look at what has finished since the last call; return True to end the run."""
        for log in simulator.finished[self._seen :]:
            self._note(log)
        self._seen = len(simulator.finished)
        if self._criterion.goodput is not None:
            return self._broken_left < 0
        waiting = sum(
            1
            for log in simulator.arrived()
            if log.scheduled_s is None
            and simulator.now_s - log.request.arrival_s > self._criterion.max_delay_s
        )
        return self._late_gaps_left < 0 or self._delayed_left - waiting < 0

    def _note(self, log: RequestLog) -> None:
        criterion = self._criterion
        if criterion.goodput is not None:
            self._broken_left -= meets_slos(log) is False
            return
        assert log.scheduled_s is not None
        self._delayed_left -= log.scheduled_s - log.request.arrival_s > criterion.max_delay_s
        if criterion.tbt_slo_ms is not None:
            times_s = paces(log) if criterion.tbt_mode == "pace" else np.diff(log.token_s)
            self._late_gaps_left -= int((times_s * 1e3 > criterion.tbt_slo_ms).sum())


@dataclass(frozen=True)
class RequestSource:
    """Where the requests of a run come from: a workload by name, or the requests of a trace at another rate.

    Attributes:
        name: of the workload, or of the trace's file.
        requests: how many.
        arrivals: how they come, for a synthetic one.
        trace: the requests of a trace.
        max_tokens: longer requests of a synthetic workload are left out; None for no limit.
        tbt_slo_ms, ttft_slo_ms: the SLO of every request, where those of the workload have none; None for none.
    """

    name: str
    requests: int
    arrivals: str = "poisson"
    trace: tuple[SimulatedRequest, ...] = ()
    max_tokens: int | None = None
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None

    def window(self, seed: int) -> tuple[SimulatedRequest, ...]:
        """Return the piece of a trace that a seed stands for: one after the other, overlapping where it is short."""
        first = seed * self.requests % max(1, len(self.trace) - self.requests + 1)
        return self.trace[first : first + self.requests]

    def at(self, rate_qps: float | None, seed: int) -> list[SimulatedRequest]:
        """Return the requests of a seed at a rate; None is a trace's own."""
        if rate_qps is None:
            window = self.window(seed)
            return [replace(r, arrival_s=r.arrival_s - window[0].arrival_s) for r in window]
        if self.trace:
            return at_rate(self.window(seed), rate_qps)
        made = synthetic(self.name, rate_qps, self.requests, seed, self.arrivals)
        if self.max_tokens is not None:
            made = [r for r in made if r.prompt_tokens + r.output_tokens <= self.max_tokens]
        if self.tbt_slo_ms is None and self.ttft_slo_ms is None:
            return made
        return [replace(r, tbt_slo_ms=self.tbt_slo_ms, ttft_slo_ms=self.ttft_slo_ms) for r in made]


@dataclass(frozen=True)
class Task:
    """One search: everything that decides its answer, as plain values.

    Attributes:
        deployment, scheduler: by name.
        workload: what is sent.
        criterion: when a run counts as carried.
        seed: of the workload.
        settings: those of SarathiConfig, for `sarathi`.
        calibration_dir: as `deployment` takes it.
        tolerance: how close the search comes, as a share.
        disturbance: what disturbs the device.
    """

    deployment: str
    scheduler: str
    workload: RequestSource
    criterion: Criterion
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()
    calibration_dir: str | None = None
    tolerance: float = TOLERANCE
    disturbance: Disturbance = UNDISTURBED

    @property
    def place(self) -> Deployment:
        """The deployment."""
        return deployment(self.deployment, self.calibration_dir)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        qps: the highest rate that was carried; None where none was.
        outcome: the figures of the run at that rate; where none was carried, of the lowest that was tried.
        runs: how many runs it took.
    """

    qps: float | None
    outcome: dict[str, Any] = field(default_factory=dict)
    runs: int = 0


def simulate_task(task: Task, rate_qps: float | None, to_the_end: bool = False) -> Outcome | None:
    """Run a task's workload at a rate; return None where it was given up as hopeless."""
    place = task.place
    requests = task.workload.at(rate_qps, task.seed)
    shared = any(request.prefix for request in requests)
    choice = scheduler_choice(task.scheduler, **dict(task.settings))
    scheduler = build(place, choice, shared, enough_tokens=enough_for(place, requests))
    times = disturbed(place.times(task.seed), task.disturbance, task.seed)
    simulator = Simulator(scheduler, times, requests, place.in_flight)
    simulator.run(None if to_the_end else Watch(task.criterion, requests))
    return None if simulator.given_up else outcome_of(simulator.logs)


def search(
    run: Callable[[float], bool],
    start: float,
    tolerance: float = TOLERANCE,
    rate_range: tuple[float, float] = RATE_RANGE,
) -> float | None:
    """Return the highest rate at which `run` answers True, within `tolerance`; None where it never does.

    Args:
        run: tries a rate; supposed to be True below some rate and False above.
        start: the first rate that is tried.
        tolerance: how far the answer may be below the rate that fails, as a share.
        rate_range: the least and the highest rate that are tried, as multiples of the first one; where the highest
            is carried, it is the answer.
    """
    least, most = start * rate_range[0], start * rate_range[1]
    good, bad, rate = None, None, start
    while good is None or bad is None:
        if run(rate):
            good, rate = rate, rate * BRACKET_FACTOR
            if bad is None and rate > most:
                return good
        else:
            bad, rate = rate, rate / BRACKET_FACTOR
            if good is None and rate < least:
                return None
    while bad / good > 1 + tolerance:
        middle = math.sqrt(good * bad)
        if run(middle):
            good = middle
        else:
            bad = middle
    return good


def first_rate(task: Task) -> float:
    """Return a rate to begin with: half of what the device could read if it did nothing else."""
    place = task.place
    requests = task.workload.at(1.0, task.seed)
    tokens = statistics.fmean(request.prompt_tokens for request in requests)
    return 0.5 / (place.prefill_s(tokens) + 1e-3)


def find(task: Task, start_qps: float | None = None) -> Found:
    """Search a task's capacity, from a first rate on; the same task and rate give the same answer anywhere."""
    outcomes: dict[float, Outcome] = {}
    runs = 0

    def run(rate_qps: float) -> bool:
        nonlocal runs
        runs += 1
        outcome = simulate_task(task, rate_qps)
        if outcome is None or not task.criterion.holds(outcome):
            return False
        outcomes[rate_qps] = outcome
        return True

    start = start_qps or first_rate(task)
    qps = search(run, start, task.tolerance)
    outcome = simulate_task(task, start * RATE_RANGE[0], to_the_end=True) if qps is None else outcomes[qps]
    assert outcome is not None
    return Found(qps, outcome.to_mapping(), runs)


def scheduler_fields(name: str) -> dict[str, Any]:
    """Return the fields of a row that `NAME` or `NAME@N` stands for."""
    spec = SchedulerSpec.parse(name)
    return {"scheduler": spec.name, "token_budget": spec.token_budget}


def row_of(tasks: Sequence[Task], found: Sequence[Found], goodput: Sequence[Found] = ()) -> dict[str, Any]:
    """Return the row of a result file for the seeds of one search; figures are those of the first seed."""
    task = tasks[0]
    slo_ms = task.criterion.tbt_slo_ms
    row = capacity_row(task.deployment, task.workload.name, slo_ms, task.scheduler, found, goodput)
    return row | {"source": task.place.source.kind, "disturbance": task.disturbance.text}


def capacity_row(
    deployment_name: str,
    workload: str,
    tbt_slo_ms: float | None,
    scheduler: str,
    found: Sequence[Found],
    goodput: Sequence[Found] = (),
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Return the row of a result file for searches that differ in their seed; `tolerance` is that of the search."""
    rates = [f.qps for f in found if f.qps is not None]
    kept = [f.qps for f in goodput if f.qps is not None]
    return {
        "deployment": deployment_name,
        "workload": workload,
        "tbt_slo_ms": tbt_slo_ms,
        **scheduler_fields(scheduler),
        "capacity_qps": statistics.fmean(rates) if len(rates) == len(found) else None,
        "ci_qps": list(confidence_range(rates, tolerance)) if len(rates) == len(found) else None,
        "gap_ms": found[0].outcome.get("gap_ms"),
        "ttft_ms": found[0].outcome.get("ttft_ms"),
        "goodput_qps": statistics.fmean(kept) if kept and len(kept) == len(goodput) else None,
    }


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95%, for 1 to 9 degrees of freedom."""


def confidence_range(rates: Sequence[float], tolerance: float = TOLERANCE) -> tuple[float, float]:
    """Return a 95% range of the mean over seeds; with one seed, what the search itself leaves open."""
    mean = statistics.fmean(rates)
    if len(rates) < 2:
        return mean, mean * (1 + tolerance)
    t = T_95[len(rates) - 2] if len(rates) - 2 < len(T_95) else 2.0
    half = t * statistics.stdev(rates) / math.sqrt(len(rates))
    return max(0.0, mean - half), mean + half


MOST_REQUESTS = 10_000_000
"""Requests of a run: as many as fit into the memory of a large machine."""


def check_requests(requests: int, least: int) -> None:
    """Raise ConfigError for a number of requests that is out of range."""
    check_int("requests", requests, minimum=least)
    if requests > MOST_REQUESTS:
        raise ConfigError(f"--requests {requests}: at most {MOST_REQUESTS:,}.")


def check_search(requests: int, seeds: int, criterion: Criterion) -> None:
    """Check what a user asked for.

    Raises:
        ConfigError: a value out of range.
    """
    check_requests(requests, 2)
    check_int("seeds", seeds, minimum=1)
    if criterion.tbt_slo_ms is not None:
        check_positive("tbt_slo_ms", criterion.tbt_slo_ms, 3.6e6)
    check_positive("max_delay_s", criterion.max_delay_s, 3.6e3)
    if not 0 < criterion.percentile <= 100:
        raise ConfigError(f"--percentile {criterion.percentile!r}: must be above 0 and at most 100.")
