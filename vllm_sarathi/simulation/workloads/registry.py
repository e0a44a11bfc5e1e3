"""All workloads by name, and when their requests arrive.

`chat` is one workload everywhere. Each can be simulated at any rate; those with a rate of their own can be run live.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.config import ConfigError, check_positive, nearest_hint
from vllm_sarathi.simulation.workloads.lengths import (
    ARXIV,
    CHAT,
    Lengths,
    bimodal_lengths,
    uniform_lengths,
    zipf_lengths,
)
from vllm_sarathi.simulation.workloads.live import LIVE_WORKLOADS, LiveWorkload
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest, check_span
from vllm_sarathi.simulation.workloads.streams import classes, mooncake


@dataclass(frozen=True)
class Workload:
    """A workload that has no rate of its own.

    Attributes:
        name: as `--workload` takes it.
        summary: one line for people.
        draw: returns the requests that arrive at given times, seconds.
    """

    name: str
    summary: str
    draw: Callable[[NDArray[np.float64], np.random.Generator], list[SimulatedRequest]]


def of_lengths(name: str, summary: str, lengths: Callable[[np.random.Generator, int], Lengths]) -> Workload:
    """Return a workload of requests that have nothing to do with each other."""

    def draw(times_s: NDArray[np.float64], rng: np.random.Generator) -> list[SimulatedRequest]:
        drawn = zip(times_s, *lengths(rng, len(times_s)), strict=True)
        return [SimulatedRequest(float(at_s), int(prompt), int(output)) for at_s, prompt, output in drawn]

    return Workload(name, summary, draw)


_ALL: tuple[Workload | LiveWorkload, ...] = (
    of_lengths("chat", "openchat_sharegpt4, by its published statistics", CHAT.draw),
    of_lengths("arxiv", "arxiv_summarization, by its published statistics", ARXIV.draw),
    of_lengths("uniform", "all lengths equally likely", uniform_lengths),
    of_lengths("zipf", "short prompts are frequent, long ones rare", zipf_lengths),
    of_lengths("bimodal", "nine short prompts to each very long one", bimodal_lengths),
    Workload("classes", "three classes with SLOs of their own", classes),
    Workload("mooncake", "conversations that share prefixes", mooncake),
    *LIVE_WORKLOADS,
)

WORKLOADS = {workload.name: workload for workload in _ALL}
"""What `--workload` takes: all of them in simulations, each LiveWorkload in live runs."""

assert len(WORKLOADS) == len(_ALL), "two workloads have one name"


def named(name: str) -> Workload | LiveWorkload:
    """Return a workload.

    Raises:
        ConfigError: it is unknown.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"--workload {name!r}: unknown workload; {nearest_hint(name, WORKLOADS)}")
    return WORKLOADS[name]


def live_names() -> tuple[str, ...]:
    """Return the names of the workloads for live runs."""
    return tuple(name for name, workload in WORKLOADS.items() if isinstance(workload, LiveWorkload))


def live_named(name: str, others: Iterable[str] = ()) -> LiveWorkload:
    """Return a workload for live runs.

    Args:
        name: its name.
        others: what `--workload` takes beside them, for the message.

    Raises:
        ConfigError: it is unknown, or has no rate of its own.
    """
    workload = WORKLOADS.get(name)
    if isinstance(workload, LiveWorkload):
        return workload
    known = (*live_names(), *others)
    if workload is not None:
        raise ConfigError(f"--workload {name!r}: can only be simulated; a live run takes {', '.join(known)}.")
    raise ConfigError(f"--workload {name!r}: unknown workload; {nearest_hint(name, known)}")


def arrival_times(
    kind: str, rate_qps: float, count: int, rng: np.random.Generator, burstiness: float = 4.0
) -> NDArray[np.float64]:
    """Return the arrival times of `count` requests, seconds, rising.

    Args:
        kind: `poisson`, `gamma` (bursty) or `fixed`.
        rate_qps: requests per second.
        count: how many.
        rng: the generator.
        burstiness: the squared coefficient of variation of the gaps, for `gamma`; 1 would be Poisson.

    Raises:
        ConfigError: a kind that is none of these, a rate out of range, or one that is too low for that count.
    """
    check_positive("rate", rate_qps, 1e6)
    if kind == "poisson":
        gaps = rng.exponential(1 / rate_qps, count)
    elif kind == "gamma":
        gaps = rng.gamma(1 / burstiness, burstiness / rate_qps, count)
    elif kind == "fixed":
        gaps = np.full(count, 1 / rate_qps)
    else:
        raise ConfigError(
            f"--arrivals {kind!r}: unknown; {nearest_hint(kind, ('poisson', 'gamma', 'fixed'))}"
        )
    times = np.asarray(np.cumsum(gaps) - gaps[0], dtype=np.float64)
    check_span(rate_qps, count, float(times[-1]))
    return times


def synthetic(
    workload: str, rate_qps: float, count: int, seed: int, arrivals: str = "poisson"
) -> list[SimulatedRequest]:
    """Return a workload by name, at a rate.

    Args:
        workload: a name in WORKLOADS.
        rate_qps: requests per second.
        count: how many requests.
        seed: seeds both the lengths and the arrivals; the lengths do not depend on the rate.
        arrivals: as `arrival_times` takes it.

    Raises:
        ConfigError: an unknown workload, or a value out of range.
    """
    lengths_rng, arrivals_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    times = arrival_times(arrivals, rate_qps, count, arrivals_rng)
    return named(workload).draw(times, lengths_rng)
