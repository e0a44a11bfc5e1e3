"""If no prefill fits beside the decodes, or almost none, neither the prompts nor the gaps starve.

There are five cases:

- Decodes alone are late already: they cannot be kept, so the prompts get PREFILL_SHARE of the time.
- A chunk is in time by the prediction, and not with the margin. It is tried, because where little has been seen, or
  nothing for long, a margin is mostly caution. An attempt that turns out late counts as a deliberately late step. Until
  a few steps of both kinds have been seen, only small attempts are made.
- Decodes alone are in time, and any prefill beside them is not: a step may be late deliberately, by at most LATE_TIMES,
  and less often than the share of gaps that may be late by the SLO (`Experience.late_credit`). Since it is late anyway,
  it takes as many tokens as that time holds, of several prompts if they wait, so that few such steps are needed.
- What comes next cannot be cut (an image, a block of a hybrid model's state) and is only a little too long: it goes.
- A prompt has waited for `max_wait_s`: the gaps give way, as in the first case.
"""

from bisect import bisect_right

from vllm_sarathi.core.experience import LEAST_ATTEMPT_TOKENS, Experience
from vllm_sarathi.core.limits.base import Candidate, encoder_tokens
from vllm_sarathi.core.limits.cold import COLD_TOKENS
from vllm_sarathi.core.limits.shape import fit_chunk, least_chunk
from vllm_sarathi.core.steptime.margin import LEAST_MARGIN
from vllm_sarathi.core.types import Reason, RequestView, StepView, chunk_work

PREFILL_SHARE = 0.2
"""Of the time, where decodes alone are late or a prompt has waited for too long."""

OVERHEAD_TIMES = 4.0
"""Then a step prefills for at least this multiple of its overhead, and the next ones prefill nothing."""

LATE_TIMES = 12.0
"""A step that is late on purpose takes at most this multiple of what it may: one late gap is one, however long."""

LATE_GROWTH = 4
"""It grows faster beyond what was seen than a step that is to be in time."""

KNOWN_HYBRID_STEPS = 3
"""Before, that nothing fits is what steps without decodes say of one with them, and no reason to be late on purpose."""

UNCUT_TIMES = 1.5
"""Something that cannot be cut goes into any step that then takes at most this multiple of what it may."""


class Floor:
    """Gives a step some prefill where the other limits leave none.

    Args:
        experience: what is known of the device.
        max_wait_s: as in the configuration.
    """

    def __init__(self, experience: Experience, max_wait_s: float) -> None:
        self._experience = experience
        self._max_wait_s = max_wait_s

    def __call__(self, view: StepView, candidate: Candidate) -> tuple[int, Reason]:
        tokens, reason = candidate.tokens, candidate.reason
        if tokens >= min(COLD_TOKENS, candidate.prompts[0].remaining_tokens):
            return tokens, reason
        if reason is Reason.BACKFILL:
            return tokens, reason
        if not view.decodes:
            return self._chunk(view, candidate, 0.0), Reason.FLOOR
        least = least_chunk(candidate.prompts[0])
        if least > 1 and self._fits(view, candidate, least):
            return least, Reason.UNCUT
        overdue = any(candidate.is_overdue(r, self._max_wait_s) for r in _served_by_first(view, candidate))
        if candidate.prompts[0].batch and not overdue:  # nothing gives way to it
            return tokens, reason if tokens else Reason.FULL
        if reason is Reason.GROWTH and not overdue:  # it waits for answers to end
            return tokens, reason
        if not candidate.late and not overdue:
            if self._experience.late_credit < 1.0:
                return tokens, reason if tokens else Reason.FULL
            attempts, known = self._experience.attempts, self._experience.hybrid_steps >= KNOWN_HYBRID_STEPS
            chunk = 0 if tokens and known else self._attempt(view, candidate)
            if chunk and attempts.allowed:
                attempts.tries(candidate.available_s)
                return max(tokens, chunk), Reason.DOUBT
            attempts.gave_way()
            if chunk and not known:
                return tokens, reason if tokens else Reason.FULL
            self._experience.late_credit -= 1.0
            return self._chunk(view, candidate, LATE_TIMES * candidate.available_s), Reason.FLOOR
        decode_s = candidate.decode_s
        overhead_s = self._experience.seconds(view, 1, 0.5, 1) - decode_s
        share_s = PREFILL_SHARE / (1 - PREFILL_SHARE) * decode_s
        least_s = self._first_s(view, candidate, least) - decode_s
        prefill_s = max(share_s, OVERHEAD_TIMES * overhead_s, least_s)
        if not candidate.late:  # then few long steps leave more of the gaps in time
            prefill_s = max(prefill_s, LATE_TIMES * candidate.available_s - decode_s)
        if (self._experience.steps_without_prefill + 1) * share_s < prefill_s:
            return tokens, reason if tokens else Reason.FULL
        return self._chunk(view, candidate, decode_s + prefill_s), Reason.FLOOR

    def _fits(self, view: StepView, candidate: Candidate, chunk: int) -> bool:
        """True where the smallest chunk of the first prompt is not much too long."""
        if candidate.late or chunk > view.max_tokens - view.decode_tokens:
            return False
        return self._first_s(view, candidate, chunk) <= UNCUT_TIMES * candidate.available_s

    def _first_s(self, view: StepView, candidate: Candidate, chunk: int) -> float:
        """Return the predicted seconds of a step with a chunk of the first prompt."""
        first = candidate.prompts[0]
        work, encoder = chunk_work(first.done_tokens, chunk), encoder_tokens(first, chunk)
        return self._experience.seconds(view, chunk, work, 1, encoder)

    def _attempt(self, view: StepView, candidate: Candidate) -> int:
        """Return the largest chunk of the first prompt that is in time by the bare prediction.

        Where none is, it is a small one all the same: the model may never have seen so few tokens. (Not of
        an image: its encoder takes the same time for a few.)
        """
        request = candidate.prompts[0]
        most = min(
            view.max_tokens - view.decode_tokens, request.remaining_tokens, self._experience.attempts.tokens
        )
        tokens = self._largest(view, candidate, (0, 0.0, 1, 0), most, candidate.available_s / LEAST_MARGIN)
        if (small := min(most, LEAST_ATTEMPT_TOKENS)) > tokens and not encoder_tokens(request, small):
            tokens = small
        return fit_chunk(request, tokens)

    def _chunk(self, view: StepView, candidate: Candidate, limit_s: float) -> int:
        """Return the most tokens within `limit_s`, in the order of turns, at least the least that moves the first."""
        room = view.max_tokens - view.decode_tokens
        known = max(
            LATE_GROWTH * self._experience.most_tokens,
            self._experience.tokens_as_alone(limit_s - candidate.decode_s),
        )
        most = min(room, max(COLD_TOKENS, known))
        first = candidate.prompts[0]
        least = max(least_chunk(first), min(COLD_TOKENS, first.remaining_tokens))
        chunk = fit_chunk(first, max(self._largest(view, candidate, (0, 0.0, 1, 0), most, limit_s), least))
        taken = min(room, max(chunk, least))
        if taken < first.remaining_tokens:
            return taken
        work, encoder = chunk_work(first.done_tokens, taken), encoder_tokens(first, taken)
        for count, request in enumerate(candidate.prompts[1:], start=2):
            # Nothing gives way to batch work; a request that is not admitted would make the decodes outgrow the SLO.
            if request.batch or taken >= candidate.admitted_tokens:
                break
            before = (taken, work, count, encoder)
            chunk = fit_chunk(request, self._largest(view, candidate, before, most, limit_s))
            taken += chunk
            if chunk < request.remaining_tokens:
                break
            work += chunk_work(request.done_tokens, chunk)
            encoder += encoder_tokens(request, chunk)
        return taken

    def _largest(
        self,
        view: StepView,
        candidate: Candidate,
        before: tuple[int, float, int, int],
        most: int,
        limit_s: float,
    ) -> int:
        """Return the most tokens of a prompt whose step is predicted to take `limit_s` at the most.

        Args:
            view, candidate: the step.
            before: tokens and attention work of the prompts before it in the step, how many prompts that makes with
                it, and the embeddings that an encoder computes for those before it.
            most: tokens of the step's prefill, at the most.
            limit_s: seconds.
        """
        taken, work, count, encoder = before
        request = candidate.prompts[count - 1]

        def step_s(part: int) -> float:
            total = work + chunk_work(request.done_tokens, part)
            images = encoder + encoder_tokens(request, part)
            return self._experience.seconds(view, taken + part, total, count, images)

        return bisect_right(range(1, min(most - taken, request.remaining_tokens) + 1), limit_s, key=step_s)


def _served_by_first(view: StepView, candidate: Candidate) -> list[RequestView]:
    """Return the first prompt, and those that have let it go first as it reads their prefix, too."""
    first = candidate.prompts[0]
    led = [r for r in candidate.prompts if r.reader is not None and view.prefills[r.reader] is first]
    return [first, *(r for r in led if r.request_id not in candidate.left_out)]
