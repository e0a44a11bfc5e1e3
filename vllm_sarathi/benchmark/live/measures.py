"""What a run of streams felt like, in figures: inter-token gaps, time to first token, throughput.

The dictionaries made here are the public result format, schema 1: `vllm-sarathi demo` writes them, and
every live benchmark puts the same fields into its rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_sarathi.benchmark.live.streams import StreamRecord


def percentiles_ms(samples_s: Sequence[float], percents: Sequence[int]) -> dict[str, float | None]:
    """`{"p50": ...}` in milliseconds, linearly interpolated; None where there is nothing to take them of."""
    if not samples_s:
        return {f"p{percent}": None for percent in percents}
    values = np.percentile(np.asarray(samples_s) * 1e3, percents)
    return {f"p{percent}": float(value) for percent, value in zip(percents, values, strict=True)}


def summarise_streams(records: Sequence[StreamRecord]) -> dict[str, Any]:
    """The result R of a run.

    - `gap_ms`: over every gap between consecutive deliveries of every stream, failed streams included: a
      stream that stalled and then broke must not make the figures better. Nothing is left out.
    - `ttft_ms`: over every request to which something came.
    - `requests`, `completed`: how many were sent, and how many ran to their end.
    - `output_tokens_per_s`: tokens of all streams, over the time from the first sending to the last delivery.
    """
    gaps_s = [gap for record in records for gap in record.gaps_s]
    ttfts_s = [record.ttft_s for record in records if record.ttft_s is not None]
    return {
        "gap_ms": {
            **percentiles_ms(gaps_s, (50, 90, 99)),
            "max": max(gaps_s) * 1e3 if gaps_s else None,
        },
        "ttft_ms": {
            "mean": float(np.mean(ttfts_s)) * 1e3 if ttfts_s else None,
            **percentiles_ms(ttfts_s, (50, 90, 99)),
        },
        "requests": len(records),
        "completed": sum(record.error is None for record in records),
        "output_tokens_per_s": _output_tokens_per_s(records),
    }


def _output_tokens_per_s(records: Sequence[StreamRecord]) -> float:
    last_s = max((record.deliveries[-1].at_s for record in records if record.deliveries), default=0.0)
    first_s = min((record.sent_s for record in records), default=0.0)
    tokens = sum(record.output_tokens for record in records)
    return tokens / (last_s - first_s) if last_s > first_s else 0.0
