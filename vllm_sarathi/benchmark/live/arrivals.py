"""The workloads of the live benchmark: how long prompts and answers are, and when they arrive.

All of it is drawn from a seed. The rates suit SmolLM2-135M on two CPU cores: the stock server carries each of them,
and yet prompts are read while streams run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

QUICK_SHARE = 0.4
"""The share of each workload's requests that `--quick` sends."""


@dataclass(frozen=True)
class Kind:
    """One kind of request; lengths in tokens, both ends included, drawn evenly.

    Attributes:
        share: the share of a workload's requests that are of this kind, to the nearest whole request.
    """

    share: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """What arrives, and when.

    Attributes:
        name: as `--workload` takes it.
        summary: one line for people.
        kinds: the kinds of requests; shares sum to 1.
        requests: how many are sent.
        rate_per_s: mean arrival rate.
        at_once: how many arrive together; 1 is a Poisson process, more come in groups at even intervals.
    """

    name: str
    summary: str
    kinds: tuple[Kind, ...]
    requests: int
    rate_per_s: float
    at_once: int = 1


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and its lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


MIXED = (Kind(0.85, (30, 150), (32, 64)), Kind(0.15, (2000, 3000), (32, 64)))

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "chat",
            "steady chat, short prompts",
            (Kind(1.0, (40, 200), (40, 80)),),
            requests=100,
            rate_per_s=2.0,
        ),
        Workload("long", "long prompts", (Kind(1.0, (700, 2000), (48, 96)),), requests=26, rate_per_s=0.3),
        Workload(
            "mix",
            "85% short prompts, 15% very long ones",
            MIXED,
            requests=80,
            rate_per_s=1.0,
        ),
        Workload(
            "rush",
            "the mix at a rate that fills the device",
            MIXED,
            requests=80,
            rate_per_s=1.4,
        ),
        Workload(
            "burst",
            "short and medium prompts, sixteen at once",
            (Kind(1.0, (60, 300), (64, 160)),),
            requests=80,
            rate_per_s=1.6,
            at_once=16,
        ),
    )
}


def quick(workload: Workload) -> Workload:
    """Return the workload with fewer requests."""
    return replace(workload, requests=round(QUICK_SHARE * workload.requests))


def draw_arrivals(workload: Workload, seed: int) -> list[Arrival]:
    """Return the requests in the order of arrival, the first at 0 s; the same for the same seed."""
    rng = np.random.default_rng(seed)
    counts = [round(kind.share * workload.requests) for kind in workload.kinds[1:]]
    counts.insert(0, workload.requests - sum(counts))
    lengths = [
        (
            int(rng.integers(*kind.prompt_tokens, endpoint=True)),
            int(rng.integers(*kind.output_tokens, endpoint=True)),
        )
        for kind, count in zip(workload.kinds, counts, strict=True)
        for _ in range(count)
    ]
    order = rng.permutation(len(lengths))
    return [
        Arrival(at_s, *lengths[i]) for at_s, i in zip(_arrival_times_s(workload, rng), order, strict=True)
    ]


def _arrival_times_s(workload: Workload, rng: np.random.Generator) -> list[float]:
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
