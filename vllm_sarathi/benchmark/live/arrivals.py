"""The requests of a live run: their lengths and the times at which they arrive, all drawn from a seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_sarathi.simulation.workloads.live import LiveWorkload

QUICK_SHARE = 0.4
"""The share of each workload's requests that `--quick` sends."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and its lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def quick(workload: LiveWorkload) -> LiveWorkload:
    """Return the workload with fewer requests."""
    return replace(workload, requests=round(QUICK_SHARE * workload.requests))


def draw_arrivals(workload: LiveWorkload, seed: int) -> list[Arrival]:
    """Return the requests in the order of arrival, the first at 0 s; the same for the same seed."""
    rng = np.random.default_rng(seed)
    lengths = workload.lengths(rng, workload.requests)
    times_s = _arrival_times_s(workload, rng)
    return [Arrival(at_s, *each) for at_s, each in zip(times_s, lengths, strict=True)]


def _arrival_times_s(workload: LiveWorkload, rng: np.random.Generator) -> list[float]:
    places = np.arange(workload.requests)
    if workload.at_once > 1:
        times_s = places // workload.at_once * (workload.at_once / workload.rate_per_s)
    else:
        gaps_s = rng.exponential(1 / workload.rate_per_s, workload.requests - 1)
        times_s = np.concatenate([[0.0], np.cumsum(gaps_s)])
    return [round(float(at_s), 3) for at_s in times_s]


def trace_lines(arrivals: Sequence[Arrival]) -> str:
    """Return the requests as the lines of a `timed_trace` data set of `vllm bench serve`.

    The number under `hash_ids` is what the words of a prompt are drawn from: no two prompts are alike.
    """
    return "".join(
        json.dumps(
            {
                "timestamp": arrival.at_s,
                "input_length": arrival.prompt_tokens,
                "output_length": arrival.output_tokens,
                "hash_ids": [number],
            }
        )
        + "\n"
        for number, arrival in enumerate(arrivals)
    )
