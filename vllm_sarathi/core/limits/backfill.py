"""Batch work is admitted only beside what requests with SLOs may need before its answers end.

What they may need is the most that they have needed lately: a number of requests at once (slots, and decodes in each
step), and of tokens in the KV cache. Running batch work gives way in every step, as it is last in the order, and gives
back slots and blocks if others wait for them (`order.yielding`). It is then prefilled again, which costs time. So what
the SLOs need from time to time is kept free beforehand, and only a new peak makes batch work give way.
"""

import math

from vllm_sarathi.core.experience import Experience
from vllm_sarathi.core.limits.base import Candidate
from vllm_sarathi.core.limits.growth import Growth
from vllm_sarathi.core.types import Occupancy, Reason, StepView

MEMORY_S = 20.0
"""A peak of work with SLOs fades by a factor of e in this time."""

SPARE = 1.0
"""The multiple of the peak that is kept free: where it is not enough, batch work that runs gives way."""

LEAST_SPARE_SHARE = 1 / 16
"""And at least this share of all there is: the first to come must find room."""

UNKNOWN_ANSWER_RUNNING = 8
"""Requests of batch work that run at once while it is unknown how long answers are."""


class Peak:
    """The most of something lately."""

    def __init__(self) -> None:
        self.value = 0.0
        self._at_s = -math.inf

    def see(self, value: float, now_s: float) -> None:
        """Note how much there is."""
        faded = self.value * math.exp(-max(0.0, now_s - self._at_s) / MEMORY_S)
        self.value, self._at_s = max(faded, value), now_s


class Backfill:
    """Bounds how much batch work runs, and admits no request that is left out.

    Args:
        experience: what is known of the device.
        growth: what a batch will cost until its answers end.
        least_slo_s: the tightest SLO for the time between tokens, as a time that a step may take, seconds.
        has_batch: whether any class is batch work; else only those left out are of interest.
    """

    def __init__(
        self, experience: Experience, growth: Growth, least_slo_s: float, has_batch: bool = True
    ) -> None:
        self._experience = experience
        self._growth = growth
        self._least_slo_s = least_slo_s
        self._has_batch = has_batch
        self._running = Peak()
        self._kv_tokens = Peak()

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        if (held := view.occupancy) is None or not (self._has_batch or candidate.left_out):
            return candidate.tokens, candidate.reason
        inside = {request.request_id for request in view.prefills}
        held_tokens = view.decode_context_tokens + sum(request.done_tokens for request in view.prefills)
        running = view.generating + len(view.prefills)
        # Those who come now, too: there may be no look at them again before they are answered.
        coming = [r for r in candidate.prompts if r.request_id not in inside and not r.batch]
        coming_tokens = sum([r.whole_tokens for r in coming])
        self._running.see(running - held.batch + len(coming), view.now_s)
        self._kv_tokens.see(held_tokens - held.batch_kv_tokens + coming_tokens, view.now_s)
        tokens, joined, joined_tokens = 0, 0, 0
        for request in candidate.prompts:
            if request.request_id in candidate.left_out and tokens < candidate.tokens:
                return tokens, Reason.BACKFILL
            if request.request_id not in inside:
                joined += 1
                joined_tokens += request.whole_tokens
                if (
                    request.batch
                    and request.request_id not in candidate.overdue
                    and not self._has_room(view, held, joined, joined_tokens)
                ):
                    if tokens < candidate.tokens:
                        return tokens, Reason.BACKFILL
                    break
            tokens += request.remaining_tokens
            if tokens >= candidate.tokens:
                break
        return candidate.tokens, candidate.reason

    def _has_room(self, view: StepView, held: Occupancy, joined: int, joined_tokens: int) -> bool:
        """Tell whether SLOs still find room where `joined` more requests run, the last of them batch work."""
        running = view.generating + len(view.prefills)
        if not running and joined == 1:
            return True
        held_tokens = view.decode_context_tokens + sum(r.done_tokens for r in view.prefills)
        with_slo, slo_tokens = running - held.batch, held_tokens - held.batch_kv_tokens
        slots = running + view.free_slots
        spare = max(SPARE * self._running.value, LEAST_SPARE_SHARE * slots)
        to_come = max(0.0, min(spare, slots - 1) - with_slo)
        if view.free_slots - joined < to_come:
            return False
        kv_tokens = held_tokens + held.free_kv_tokens
        spare_tokens = max(SPARE * self._kv_tokens.value, LEAST_SPARE_SHARE * kv_tokens)
        left_to_read = sum(r.remaining_tokens for r in view.prefills)
        growing = (
            (held.batch + joined) * self._growth.answers.mean_tokens if self._growth.answers.known else 0.0
        )
        free = held.free_kv_tokens - left_to_read - joined_tokens - growing
        if free < max(0.0, spare_tokens - slo_tokens):
            return False
        if not self._growth.answers.known:
            return held.batch + joined <= UNKNOWN_ANSWER_RUNNING
        if self._least_slo_s == math.inf or not self._experience.model.ready:
            return True
        count = running + joined + math.ceil(to_come)
        context = held_tokens + left_to_read + joined_tokens + int(max(0.0, spare_tokens - slo_tokens))
        return self._growth.peak_s(count, context) <= self._least_slo_s / self._experience.model.decode_margin
