"""Whose prompt is read first.

`fcfs` is the queue's own order. `deadline` is, in three ranks:

1. *overdue*: it has waited longer than the bound; by arrival.
2. *promised*: it has a time to first token, and reading it now still makes it; earliest deadline first,
   shortest remaining as tie-break.
3. *the rest*: no promise, or one that can no longer be kept and so stops harming those that can. The deadline is
   implied by the length (arrival + STRETCH x the time to read it), so that a short prompt does not wait behind a
   100k one, and a long one gains on later arrivals as it ages.

The bound: a prompt that has waited `max_wait_s` goes before every later arrival, so it has its first token no later
than `max_wait_s` + the time to read it and those that arrived before it.
"""

from collections.abc import Callable

from vllm_sarathi.core.views import RequestView

STRETCH = 10.0
"""A prompt without a promise is due after so many times the time that reading it alone takes."""

Key = tuple[int, float, float]


def deadline_key(
    request: RequestView, ttft_slo_s: float | None, max_wait_s: float, read_s: Callable[[int, int], float]
) -> Key:
    """Return the request's place in `deadline` order; smaller goes first.

    Args:
        request: the request.
        ttft_slo_s: the promise to requests without one of their own; None for none.
        max_wait_s: the bound on waiting.
        read_s: seconds to read so many remaining tokens after so many done ones.
    """
    if request.age_s >= max_wait_s:
        return (0, -request.age_s, 0.0)
    remaining_s = read_s(request.done_tokens, request.remaining_tokens)
    slo_s = ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
    if slo_s is not None and request.age_s + remaining_s <= slo_s:
        return (1, slo_s - request.age_s, remaining_s)
    total_s = remaining_s + read_s(0, request.done_tokens)
    return (2, STRETCH * total_s - request.age_s, remaining_s)
