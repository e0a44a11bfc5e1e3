"""The figures of a simulated run: gaps between tokens, times to first token, delays, SLOs kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.simulation.simulator import RequestLog

SLO_PERCENTILE = 99
"""A request keeps its SLO of time between tokens where this percentile of its own gaps does."""


@dataclass(frozen=True)
class Outcome:
    """Samples of a run.

    Attributes:
        gaps_s: every gap between two tokens of a request, seconds.
        ttfts_s: every request's time to first token, seconds.
        delays_s: every request's wait until its first token of prompt was scheduled, seconds.
        kept: for each request with an SLO of its own, whether it was kept.
        requests, completed: how many were sent, and how many finished.
        output_tokens_per_s: over the time from the first arrival to the last token.
        paces_s: for every token after a request's first, the seconds since the first over the tokens since then.
    """

    gaps_s: NDArray[np.float64]
    ttfts_s: NDArray[np.float64]
    delays_s: NDArray[np.float64]
    kept: NDArray[np.bool_]
    requests: int
    completed: int
    output_tokens_per_s: float
    paces_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def request_attainment(self) -> float | None:
        """The share of the requests with an SLO that kept it; None where there are none."""
        return float(self.kept.mean()) if len(self.kept) else None

    def to_mapping(self) -> dict[str, Any]:
        """Return the figures, with the field names of every other benchmark here (schema 1)."""
        return {
            "gap_ms": {
                **_percentiles_ms(self.gaps_s),
                "max": _ms(self.gaps_s.max()) if len(self.gaps_s) else None,
            },
            "ttft_ms": {
                "mean": _ms(mean_of(self.ttfts_s)) if len(self.ttfts_s) else None,
                **_percentiles_ms(self.ttfts_s),
            },
            "delay_ms": _percentiles_ms(self.delays_s),
            "requests": self.requests,
            "completed": self.completed,
            "request_attainment": self.request_attainment,
            "output_tokens_per_s": self.output_tokens_per_s,
        }


def mean_of(samples: NDArray[np.float64]) -> float:
    """Return a mean that is the same in whichever order the samples come: by class, or by replica."""
    return math.fsum(samples) / len(samples)


def _ms(seconds: "float | np.floating[Any]") -> float:
    return float(seconds) * 1e3


def _percentiles_ms(samples_s: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(samples_s):
        return {f"p{percent}": None for percent in (50, 90, 99)}
    return {f"p{percent}": _ms(np.percentile(samples_s, percent)) for percent in (50, 90, 99)}


def outcome_of(logs: Sequence[RequestLog]) -> Outcome:
    """Return the figures of the requests of a run."""
    gaps = [np.diff(log.token_s) for log in logs]
    answered = [log for log in logs if log.token_s]
    last_s = max((log.token_s[-1] for log in answered), default=0.0)
    first_s = min((log.request.arrival_s for log in logs), default=0.0)
    tokens = sum(len(log.token_s) for log in logs)
    return Outcome(
        gaps_s=np.concatenate(gaps) if gaps else np.empty(0),
        paces_s=np.concatenate([paces(log) for log in logs]) if logs else np.empty(0),
        ttfts_s=np.array([log.token_s[0] - log.request.arrival_s for log in answered]),
        delays_s=np.array(
            [log.scheduled_s - log.request.arrival_s for log in logs if log.scheduled_s is not None]
        ),
        kept=np.array([kept for log in logs if (kept := meets_slos(log)) is not None], dtype=bool),
        requests=len(logs),
        completed=sum(log.finished for log in logs),
        output_tokens_per_s=tokens / (last_s - first_s) if last_s > first_s else 0.0,
    )


def paces(log: RequestLog) -> NDArray[np.float64]:
    """Return, for each token after the first, the seconds since the first over the tokens since then.

    Token n is in time where it comes by first token + n x SLO (see `core.deadlines`): where this is within the SLO.
    """
    since_s = np.asarray(log.token_s[1:], dtype=np.float64) - (log.token_s[0] if log.token_s else 0.0)
    return since_s / np.arange(1, len(since_s) + 1)


def meets_slos(log: RequestLog) -> bool | None:
    """Return whether a request met its own SLOs; None where it has none."""
    request = log.request
    if request.tbt_slo_ms is None and request.ttft_slo_ms is None:
        return None
    if not log.finished:
        return False
    if request.ttft_slo_ms is not None and _ms(log.token_s[0] - request.arrival_s) > request.ttft_slo_ms:
        return False
    if request.tbt_slo_ms is None or len(log.token_s) < 2:
        return True
    return _ms(np.percentile(np.diff(log.token_s), SLO_PERCENTILE)) <= request.tbt_slo_ms
