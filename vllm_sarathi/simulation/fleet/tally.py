"""Figures of many requests that need not be in one place: what each replica counts can be added up.

Requests that run together have the same gaps, so gaps are kept as values and how often each came. Percentiles are
those of numpy to the last bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.simulation.outcome import mean_of, meets_slos
from vllm_sarathi.simulation.simulator import RequestLog

Floats = NDArray[np.float64]

PERCENTILES = (50, 90, 99)


def _none() -> Floats:
    return np.empty(0)


@dataclass(frozen=True)
class Tally:
    """Samples of requests.

    Attributes:
        gaps_s: gaps between tokens, each value once and rising, seconds.
        gap_counts: how often each came.
        ttfts_s: times to first token, seconds.
        delays_s: waits until the first token of prompt was scheduled, seconds.
        kept, with_slo: requests that met their own SLOs, and requests that have any.
        requests, completed, refused: how many.
        prompt_tokens, output_tokens: of those that got an answer, or a part of one.
        first_s, last_s: the first arrival and the last token.
    """

    gaps_s: Floats = field(default_factory=_none)
    gap_counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    ttfts_s: Floats = field(default_factory=_none)
    delays_s: Floats = field(default_factory=_none)
    kept: int = 0
    with_slo: int = 0
    requests: int = 0
    completed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_s: float = float("inf")
    last_s: float = 0.0

    @property
    def request_attainment(self) -> float | None:
        """The share of the requests with SLOs of their own that met them; None without any."""
        return self.kept / self.with_slo if self.with_slo else None

    def attainment(self, tbt_slo_ms: float | None) -> float | None:
        """Return the share of gaps within the SLO; None without one, or without gaps."""
        if tbt_slo_ms is None or not len(self.gaps_s):
            return None
        within = self.gap_counts[self.gaps_s * 1e3 <= tbt_slo_ms].sum()
        return float(within / self.gap_counts.sum())

    def gap_percentile_s(self, percent: float) -> float | None:
        """Return a percentile of the gaps, as numpy interpolates it; None without gaps."""
        if not len(self.gaps_s):
            return None
        ends = np.cumsum(self.gap_counts)
        at = (ends[-1] - 1) * (percent / 100)
        low = int(at)
        below, above = (
            self.gaps_s[np.searchsorted(ends, place, side="right")]
            for place in (low, min(low + 1, ends[-1] - 1))
        )
        share, step = at - low, above - below
        return float(above - step * (1 - share) if share >= 0.5 else below + step * share)

    def to_mapping(self, tbt_slo_ms: float | None = None) -> dict[str, Any]:
        """Return the figures, with the field names of `Outcome.to_mapping`."""
        span_s = self.last_s - self.first_s
        gaps = {f"p{p}": _ms(self.gap_percentile_s(p)) for p in PERCENTILES}
        return {
            "gap_ms": {**gaps, "max": _ms(float(self.gaps_s[-1])) if len(self.gaps_s) else None},
            "ttft_ms": {
                "mean": _ms(mean_of(self.ttfts_s)) if len(self.ttfts_s) else None,
                **_percentiles_ms(self.ttfts_s),
            },
            "delay_ms": _percentiles_ms(self.delays_s),
            "requests": self.requests,
            "completed": self.completed,
            "refused": self.refused,
            "attainment": self.attainment(tbt_slo_ms),
            "request_attainment": self.request_attainment,
            "output_tokens_per_s": self.output_tokens / span_s if span_s > 0 else 0.0,
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _percentiles_ms(samples_s: Floats) -> dict[str, float | None]:
    found = np.percentile(samples_s, PERCENTILES) if len(samples_s) else [None] * len(PERCENTILES)
    return {f"p{p}": _ms(None if v is None else float(v)) for p, v in zip(PERCENTILES, found, strict=True)}


def tally(logs: Sequence[RequestLog]) -> Tally:
    """Return the figures of logs."""
    gaps = [np.diff(log.token_s) for log in logs]
    values, counts = np.unique(np.concatenate(gaps) if gaps else _none(), return_counts=True)
    answered = [log for log in logs if log.token_s]
    kept = [kept for log in logs if (kept := meets_slos(log)) is not None]
    return Tally(
        values,
        counts.astype(np.int64),
        np.array([log.token_s[0] - log.request.arrival_s for log in answered]),
        np.array([log.scheduled_s - log.request.arrival_s for log in logs if log.scheduled_s is not None]),
        sum(kept),
        len(kept),
        len(logs),
        sum(log.finished for log in logs),
        sum(log.refused for log in logs),
        sum(log.request.prompt_tokens for log in answered),
        sum(len(log.token_s) for log in answered),
        min((log.request.arrival_s for log in logs), default=float("inf")),
        max((log.token_s[-1] for log in answered), default=0.0),
    )


def merged(tallies: Iterable[Tally]) -> Tally:
    """Return the figures of all together."""
    every = list(tallies)
    gaps = np.concatenate([each.gaps_s for each in every]) if every else _none()
    counts = np.concatenate([each.gap_counts for each in every]) if every else np.empty(0, np.int64)
    values, places = np.unique(gaps, return_inverse=True)
    sums = np.zeros(len(values), np.int64)
    np.add.at(sums, places, counts)
    return Tally(
        values,
        sums,
        np.concatenate([each.ttfts_s for each in every]) if every else _none(),
        np.concatenate([each.delays_s for each in every]) if every else _none(),
        kept=sum(each.kept for each in every),
        with_slo=sum(each.with_slo for each in every),
        requests=sum(each.requests for each in every),
        completed=sum(each.completed for each in every),
        refused=sum(each.refused for each in every),
        prompt_tokens=sum(each.prompt_tokens for each in every),
        output_tokens=sum(each.output_tokens for each in every),
        first_s=min((each.first_s for each in every), default=float("inf")),
        last_s=max((each.last_s for each in every), default=0.0),
    )
