"""Workloads for live runs, each with its own rate.

The rates suit SmolLM2-135M on two CPU cores: the stock server carries each of them, and yet prompts are prefilled
while streams run.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.simulation.workloads.requests import SimulatedRequest


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
class LiveWorkload:
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

    def lengths(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Return prompt and output tokens of `count` requests, the kinds in random order."""
        counts = [round(kind.share * count) for kind in self.kinds[1:]]
        counts.insert(0, count - sum(counts))
        drawn = [
            (
                int(rng.integers(*kind.prompt_tokens, endpoint=True)),
                int(rng.integers(*kind.output_tokens, endpoint=True)),
            )
            for kind, of_kind in zip(self.kinds, counts, strict=True)
            for _ in range(of_kind)
        ]
        return [drawn[i] for i in rng.permutation(len(drawn))]

    def draw(self, times_s: NDArray[np.float64], rng: np.random.Generator) -> list[SimulatedRequest]:
        """Return the requests that arrive at these times; their own rate does not count."""
        lengths = self.lengths(rng, len(times_s))
        return [SimulatedRequest(float(at_s), *each) for at_s, each in zip(times_s, lengths, strict=True)]


MIXED = (Kind(0.85, (30, 150), (32, 64)), Kind(0.15, (2000, 3000), (32, 64)))

LIVE_WORKLOADS = (
    LiveWorkload(
        "short",
        "steady chat, short prompts",
        (Kind(1.0, (40, 200), (40, 80)),),
        requests=100,
        rate_per_s=2.0,
    ),
    LiveWorkload("long", "long prompts", (Kind(1.0, (700, 2000), (48, 96)),), requests=26, rate_per_s=0.3),
    LiveWorkload("mix", "85% short prompts, 15% very long ones", MIXED, requests=80, rate_per_s=1.0),
    LiveWorkload("rush", "the mix at a rate that fills the device", MIXED, requests=80, rate_per_s=1.4),
    LiveWorkload(
        "burst",
        "short and medium prompts, sixteen at once",
        (Kind(1.0, (60, 300), (64, 160)),),
        requests=80,
        rate_per_s=1.6,
        at_once=16,
    ),
)
