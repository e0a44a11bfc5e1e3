"""The requests that a workload consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sarathi.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request of a workload.

    Attributes:
        arrival_s: when it arrives, seconds from the start.
        prompt_tokens: length of its prompt.
        output_tokens: length of its answer.
        tbt_slo_ms: its own SLO for the time between tokens; None for none of its own.
        ttft_slo_ms: its own SLO for the time to first token; None for none of its own.
        prefix: names of the leading pieces of its prompt, PREFIX_TOKENS long each, as a trace gives them: two
            requests whose first names agree share that part of the prompt.
        kind: the class it belongs to, for reports and for schedulers that know classes.
        tenant: whose it is.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    prefix: tuple[int, ...] = ()
    kind: str = ""
    tenant: str = ""


PREFIX_TOKENS = 512
"""Tokens in one piece of a shared prefix (Mooncake's trace, arXiv 2407.00079, section 4.1)."""


LONGEST_S = 1e9
"""The latest arrival. A clock in float seconds counts tenths of a microsecond there; far later, steps take no time."""


def check_span(rate_qps: float, count: int, span_s: float) -> None:
    """Refuse a rate so low that the last request would arrive too late for the clock.

    Args:
        rate_qps: requests per second.
        count: how many requests.
        span_s: from the first to the last.

    Raises:
        ConfigError: so it is.
    """
    if span_s > LONGEST_S:
        raise ConfigError(
            f"--rate {rate_qps:g}: {count} requests would take {span_s:.3g} s to arrive; "
            f"at most {LONGEST_S:g} s can be simulated."
        )


def at_rate(requests: Sequence[SimulatedRequest], rate_qps: float) -> list[SimulatedRequest]:
    """Return the same requests with their arrival times stretched so that they come at a mean rate.

    Those that all come at once have no rhythm: they come one by one, evenly.

    Raises:
        ConfigError: a rate that is too low, as for `check_span`.
    """
    start_s, span_s = requests[0].arrival_s, requests[-1].arrival_s - requests[0].arrival_s
    check_span(rate_qps, len(requests), (len(requests) - 1) / rate_qps)
    if not span_s:
        return [replace(r, arrival_s=place / rate_qps) for place, r in enumerate(requests)]
    factor = (len(requests) - 1) / rate_qps / span_s
    return [replace(r, arrival_s=(r.arrival_s - start_s) * factor) for r in requests]


def prompt_token_ids(request: SimulatedRequest, index: int, share_prefixes: bool) -> list[Any]:
    """Return token ids for a request's prompt; equal pieces of prefix get equal tokens, all else differs."""
    if not share_prefixes:
        return [0] * request.prompt_tokens
    tokens: list[int] = []
    for piece in request.prefix:
        tokens += [2 * piece + 2] * PREFIX_TOKENS
    tokens = tokens[: request.prompt_tokens]
    return tokens + [2 * index + 1] * (request.prompt_tokens - len(tokens))
