"""SLOs that clients ask for: read once when a request arrives, so that nothing bad reaches a step.

An OpenAI client sends `vllm_xargs: {"tbt_slo_ms": 30, "ttft_slo_ms": 500}`, a Python one
`SamplingParams(extra_args={...})`. Either is plain data from outside: any value may be anything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.config import MAX_SLO_MS, SarathiConfig
from vllm_sarathi.engine.vllm.internals import logger


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """A request's own SLOs, seconds; None where it has none."""

    tbt_slo_s: float | None = None
    ttft_slo_s: float | None = None


NONE = RequestSlo()


def read_request_slo(extra_args: object, config: SarathiConfig) -> RequestSlo:
    """Return the SLOs in a request's extra arguments; what is no valid SLO is passed over, and logged."""
    if not config.allow_request_slo or not isinstance(extra_args, Mapping):
        return NONE
    slo = RequestSlo(*(_seconds(extra_args, key, config) for key in ("tbt_slo_ms", "ttft_slo_ms")))
    return NONE if slo == NONE else slo


def _seconds(extra_args: Mapping[Any, Any], key: str, config: SarathiConfig) -> float | None:
    value = extra_args.get(key)
    if value is None:
        return None
    # bool is a number to Python; an int too large for a float would raise.
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SLO_MS
    if not usable or math.isnan(value) or value <= 0:
        logger.info(
            "A request asked for %s=%.80r, which is no time in milliseconds; it is ignored.", key, value
        )
        return None
    return max(float(value), config.min_request_slo_ms) / 1e3
