"""`deadline`: the earliest deadline first.

There are four ranks:

1. *overdue*, in every second step: it has waited longer than the bound; by arrival.
2. *with an SLO*: it has a time to first token that can still be kept; earliest deadline first, shortest remaining as
   tie-break.
3. *given up*: its time to first token cannot be kept any more, so it no longer delays those that can be; but it goes
   before what has no SLO.
4. *the rest*: no SLO.

In the last two the deadline follows from the length (arrival + STRETCH x the time to prefill it), so that a short
prompt does not wait behind a 100k one, and a long one gains on later arrivals as it ages.

Before all of them go those that were preempted in the middle of an answer: their next token is late already. Nor
does anybody pass them who would take the KV blocks that they wait for.

Which SLOs are given up is decided for all prompts together, so that as many as possible are kept: if one would be late,
the longest so far is given up (`first_token.keep`).

Any number may wait: the order only has to see those in the middle of an answer, the oldest, those whose deadline is
next, and the oldest of each octave of lengths (see `Order.lists`).

The bound: a prompt that has waited `max_wait_s` goes before every later arrival in at least every second step, so it
has its first token no later than `max_wait_s` + twice the time to prefill it and those that arrived before it. The
steps between go on keeping SLOs; otherwise one long overdue prompt would break those of all that come meanwhile.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.first_token import Job, keep
from vllm_sarathi.core.order.base import ANSWERING_SEEN, Facts, Turn, turn_by_keys
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import (
    Pipeline,
    Reason,
    RequestView,
    StepRecord,
    StepShape,
    StepView,
    chunk_work,
)

OLDEST_SEEN = 8
DUE_SEEN = 48
OCTAVE_SEEN = 3
OCTAVES = 24
"""How many of those that wait are looked at: the oldest, the next due, and the oldest of each octave of lengths."""

STRETCH = 10.0
"""A prompt without an SLO to keep is due after this multiple of the time that prefilling it alone takes."""

ARRIVAL_STEPS = 4
"""Steps that fit into the shortest SLO for the time to first token, whatever decodes: a new request finds up to two
steps in flight, and has to be prefilled in the third."""

ARRIVAL_DECODE_STEPS = 4
"""But a step may take this multiple of a decode step: else what it costs beside the prompts would be most of it."""

ENDED_EARLY = (Reason.ALL, Reason.ANSWER, Reason.TURNOVER, Reason.DOUBT)
"""Steps that do not show how fast full ones prefill: they had no more, or were ended early."""

PREFILL_CAUTION = 1.05
"""Prompts that fit only just are late in the end, and took the time of others: each is taken to need longer."""

ATTENTION_SHARE = 0.8
"""Of a step, at the most: the rest is what its tokens take by themselves."""

SLO_REMEMBERED_S = 600.0
"""A short SLO of one request is expected again for this time."""

Key = tuple[int, float, float]

PrefillTime = Callable[[int, int], float]
"""Seconds to prefill a number of remaining tokens after a number of done ones."""


def kept_slos(
    requests: Sequence[RequestView], ttft_slo_s: float | None, lead_s: float, prefill_s: PrefillTime
) -> dict[int, Key]:
    """Return the keys of those requests, by index, whose time to first token can be kept together.

    Args:
        requests: all that are to be prefilled.
        ttft_slo_s: the SLO of requests without one of their own; None for none.
        lead_s: seconds before the first of them can be prefilled, and between prefill and answering.
        prefill_s: how long prefill takes.
    """
    jobs, indices = [], []
    for index, request in enumerate(requests):
        slo_s = ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
        if slo_s is not None and request.age_s < slo_s and not request.answering:
            left_s = prefill_s(request.done_tokens, request.remaining_tokens)
            jobs.append(Job(slo_s - request.age_s, left_s, loss=-left_s))
            indices.append(index)
    return {indices[place]: (1, jobs[place].due_s, jobs[place].prefill_s) for place in keep(jobs, lead_s)}


def deadline_keys(
    requests: Sequence[RequestView],
    ttft_slo_s: float | None,
    max_wait_s: float,
    lead_s: float,
    prefill_s: PrefillTime,
    overdue_first: bool = True,
) -> list[Key]:
    """Return each request's place in `deadline` order; smaller goes first.

    Args:
        requests, ttft_slo_s, lead_s, prefill_s: as in `kept_slos`.
        max_wait_s: the bound on waiting.
        overdue_first: whether it is the turn of those that have waited longer.
    """
    overdue = {i for i, request in enumerate(requests) if request.age_s >= max_wait_s}
    # While some are overdue, half of the steps are theirs.
    kept = kept_slos(
        requests, ttft_slo_s, lead_s, (lambda done, left: 2 * prefill_s(done, left)) if overdue else prefill_s
    )
    keys = []
    for index, request in enumerate(requests):
        if request.answering:
            keys.append((-1, -request.age_s, float(index)))
        elif overdue_first and index in overdue:
            keys.append((0, -request.age_s, float(index)))  # of one moment, the first in the queue
        elif index in kept:
            keys.append(kept[index])
        else:
            remaining_s = prefill_s(request.done_tokens, request.remaining_tokens)
            own = request.done_tokens - request.cached_tokens
            total_s = remaining_s + prefill_s(request.cached_tokens, own)
            has_slo = request.ttft_slo_s is not None or ttft_slo_s is not None
            keys.append((2 if has_slo else 3, STRETCH * total_s - request.age_s, remaining_s))
    return keys


class DeadlineOrder:
    """Orders the prompts of each step by deadline, from how fast prompts have been prefilled so far.

    Args:
        config: the settings.
        model: tells how long prefill takes, until enough has been seen to know.
        pipeline: the stages of the device.
    """

    sees_one_step = False
    lists: Mapping[str, int] = {
        "answering": ANSWERING_SEEN,
        "arrival": OLDEST_SEEN,
        "due": DUE_SEEN,
        **{f"octave {i}": OCTAVE_SEEN for i in range(OCTAVES)},
    }

    def __init__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> None:
        self._ttft_slo_s = None if config.ttft_slo_ms is None else config.ttft_slo_ms / 1e3
        self._max_wait_s = config.prefill_max_wait_s
        self._request_slos = config.allow_request_slo
        self._model = model
        self._pipeline = pipeline
        self._least_ttft_slo_s, self._least_seen_s = self._ttft_slo_s or math.inf, -math.inf
        self._token_s: float | None = None
        self._step_s = 0.0
        self._overdue_first = True

    def keys(self, facts: Facts) -> Mapping[str, float]:
        """Return when it arrived, when it is due, and its octave."""
        octave = min(OCTAVES - 1, facts.remaining_tokens.bit_length())
        keys = {"arrival": facts.arrival_s, f"octave {octave}": facts.arrival_s}
        slo_s = self._ttft_slo_s if facts.ttft_slo_s is None else facts.ttft_slo_s
        if slo_s is not None:
            keys["due"] = facts.arrival_s + slo_s
        if facts.answering:
            keys["answering"] = facts.arrival_s
        return keys

    def starts(self, wall_s: float) -> Mapping[str, float]:
        """Return now for the deadlines: those that are over cannot be kept."""
        return {"due": wall_s}

    def presses(self, bond: Bond, age_s: float, request_id: str, answering: bool) -> bool:
        """Return whether a request is in the middle of an answer, or has waited for its bound."""
        return answering or age_s >= self._max_wait_s

    def longest_step_s(self, decode_step_s: float, tbt_slo_s: float | None) -> float:
        """Return the longest step that gives a request that arrives now its first token in time."""
        least_s = self._pipeline.step_s(self._least_ttft_slo_s / ARRIVAL_STEPS)
        if least_s == math.inf and self._request_slos:
            least_s = math.inf if tbt_slo_s is None else self._pipeline.step_s(tbt_slo_s)
        return max(least_s, ARRIVAL_DECODE_STEPS * decode_step_s)

    def turn(self, view: StepView) -> Turn:
        """Return whose turn it is in the step at hand."""
        requests = (*view.prefills, *view.waiting)
        self._note_slos(view.now_s, requests)
        keys = deadline_keys(
            requests,
            self._ttft_slo_s,
            self._max_wait_s,
            self._pipeline.token_s(self._step_s),
            self._prefill_s,
            self._overdue_first,
        )
        return turn_by_keys(view, keys)

    def planned(self, prefill_tokens: int) -> None:
        """Note what the step that was ordered last is going to prefill."""
        if prefill_tokens > 0:
            self._overdue_first = not self._overdue_first

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step how fast prompts are prefilled."""
        tokens = record.shape.tokens - record.shape.decodes
        if tokens <= 0 or not 0 < record.measured_s < math.inf:
            return
        if record.reason not in ENDED_EARLY or self._token_s is None:
            attention_s = min(
                self._model.work_s * record.shape.prefill_work, ATTENTION_SHARE * record.measured_s
            )
            token_s = (record.measured_s - attention_s) / tokens
            known = token_s if self._token_s is None else self._token_s
            self._token_s = 0.9 * known + 0.1 * token_s
        self._step_s = 0.9 * self._step_s + 0.1 * record.measured_s

    def _prefill_s(self, done_tokens: int, remaining_tokens: int) -> float:
        """Return the seconds of prefill of a prompt: its attention grows with what was prefilled of it before."""
        work = chunk_work(done_tokens, remaining_tokens)
        if self._token_s is None:
            return self._model.predict(StepShape(remaining_tokens, 0, 0, work, 1))
        return PREFILL_CAUTION * (remaining_tokens * self._token_s + self._model.work_s * work)

    def _note_slos(self, now_s: float, requests: Sequence[RequestView]) -> None:
        """Keep the shortest SLO of the last minutes."""
        own = [r.ttft_slo_s for r in requests if r.ttft_slo_s is not None]
        least_s = min([self._ttft_slo_s or math.inf, *own])
        if least_s <= self._least_ttft_slo_s or now_s - self._least_seen_s > SLO_REMEMBERED_S:
            self._least_ttft_slo_s, self._least_seen_s = least_s, now_s
