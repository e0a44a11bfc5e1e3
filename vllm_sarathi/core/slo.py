"""SloBudget: the largest prefill that still ends in time, found anew in every step.

The paper profiles one budget per deployment and leaves a dynamic one to future work (Sarathi-Serve,
arXiv 2403.02310, section 4.3). Here the budget of a step is the largest number of prefill tokens whose step,
as the cost model foretells it, ends before the most urgent next token is due.
"""

import math
from collections import deque
from collections.abc import Sequence

from vllm_sarathi.core.backlog import Backlog
from vllm_sarathi.core.config import SarathiConfig, auto_factor
from vllm_sarathi.core.cost_model import CostModel
from vllm_sarathi.core.deadlines import TokenDeadlines
from vllm_sarathi.core.ordering import DeadlineOrder, Order
from vllm_sarathi.core.policies import arrival_order, decodes_only
from vllm_sarathi.core.stages import StageClock
from vllm_sarathi.core.views import RequestView, StepPlan, StepRecord, StepView, chunk_work

COLD_TOKENS = 16
"""The first chunk beside decodes, before anything is known; also the floor that guarantees progress."""

GROWTH = 2.0
"""A step may be so many times the largest of its kind, with decodes or without, that was seen: the model is trusted
near what it has seen."""

PATIENCE_STEPS = 128
"""Prefills that find no room wait so many steps for one of the floor: that costs less than 1% of the gaps."""

READ_ALONE_KEPT = 16
"""The latest steps without decodes, from which the first chunks beside decodes know what they can be."""

DECODE_ONLY_EVERY_STEPS = 64
"""A step without prefill so often, where it matters how long decodes alone take: else nothing tells it apart."""

TILE_TOKENS = 16
ALIGNMENT_LOSS = 1 / 16
"""A budget is cut down to whole tiles where that loses at most this share of the chunk."""

TAIL_SHARE = 1 / 16
TAIL_OVERRUN = 1.02
"""A chunk that would leave less than the share of itself is read whole if the step then overruns by 2% at most."""

FIXED_SHARE = 0.5
"""So much of what a step of decodes usually takes does one more step cost at least, whatever is in it."""

LEAST_PART_TOKENS = 256
"""What is read is not divided among a pipeline's batches into smaller parts: reading the weights would take longer."""

WAITING_SEEN = {"fcfs": 16, "deadline": 256}
"""How far into the queue each order looks."""

SHORTEST_FIRST_OF = {"fcfs": 64, "deadline": 0}
"""Of prompts that come during one step nobody was first, and read by their lengths they wait the least in the mean (the
shortest job first). More of them are no burst but a batch job: its order may be meant, as where prefixes are shared."""


class SloBudget:
    """Plans each step by the promised time between tokens.

    Args:
        config: the settings.
        model: the step-time model, which learns from the same steps.
        steps_per_token: as in TokenDeadlines.
    """

    def __init__(self, config: SarathiConfig, model: CostModel, steps_per_token: int = 1) -> None:
        self.config = config
        self.model = model
        self.deadlines = TokenDeadlines(config.tbt_mode, steps_per_token)
        self.waiting_seen = WAITING_SEEN[config.prefill_order]
        self.shortest_first_of = SHORTEST_FIRST_OF[config.prefill_order]
        self.sees_one_step = config.prefill_order == "fcfs"
        self.needs_decode_views = self.deadlines.needs_decode_views or config.allow_request_slo
        self.unkeepable = False
        self._factor = auto_factor(config.tbt_slo)
        self._steps_per_token = steps_per_token
        self._decode_step_s: float | None = None
        self._last_prefill_tokens = 0
        self._most_tokens = 0
        self._most_idle_tokens = 0
        self._read_alone: deque[tuple[int, float]] = deque(maxlen=READ_ALONE_KEPT)
        self._steps_without_prefill = 0
        self._steps_since_decode_only = DECODE_ONLY_EVERY_STEPS
        self._backlog = Backlog()
        self._stages = StageClock(steps_per_token)
        self._by_deadline = (
            None if config.prefill_order == "fcfs" else DeadlineOrder(config, model, steps_per_token)
        )

    @property
    def tbt_slo_s(self) -> float | None:
        """The promised time between tokens; None while `auto` has no decode step to go by."""
        if self.config.tbt_slo_ms is not None:
            return self.config.tbt_slo_ms / 1e3
        if self._decode_step_s is None:
            return None
        return self._factor * self._decode_step_s * self._steps_per_token

    def plan(self, view: StepView) -> StepPlan:
        """Decide the next step."""
        if view.decodes and not (view.prefills or view.waiting or view.unseen_waiting):
            # The answer that all below comes to, without its cost: most steps of a server are such.
            self._planned(0)
            self._backlog.planned(0, 0)
            return decodes_only(view, "none")
        order = self._order(view)
        longest_s = self._longest_step_s()
        ahead = [view.prefills[i] for i in order.prefills]
        ahead += [view.waiting[i] for i in (order.waiting or range(len(view.waiting)))[: order.let_in]]
        if view.unseen_waiting and order.let_in is None:
            # Nothing is known of them (further back in the queue, or in another one): as long as it takes.
            ahead.append(RequestView("unseen", (0.0, 0.0), 0.0, 0, view.max_tokens))
        if not view.generating and longest_s == math.inf:
            prefill_tokens, reason = self._idle_tokens(view, ahead)
        else:
            prefill_tokens, reason = self._prefill_tokens(view, ahead, longest_s)
        self._planned(prefill_tokens)
        read = _prompts_within(ahead, prefill_tokens)
        self._backlog.planned(read, _left(view, ahead, read))
        if prefill_tokens == 0 and view.decodes:
            # Held, not only left out of the budget: a decode that turns out to end would leave its token to a prompt.
            return decodes_only(view, reason)
        budget = min(view.max_tokens, max(1, view.decode_tokens + prefill_tokens))
        return StepPlan(budget, order.prefills, order.held, order.waiting, reason=reason)

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step."""
        shape = record.shape
        self.deadlines.completed(record.completed_s)
        measured_s = record.measured_s
        if self._steps_per_token > 1 and record.started_s is not None:
            measured_s = self._stages.seconds(record.started_s, record.completed_s)
        self.model.observe(shape, measured_s)
        if shape.decodes:  # a long prompt read alone says little of a small step beside decodes
            self._most_tokens = max(self._most_tokens, shape.tokens)
        else:
            self._most_idle_tokens = max(self._most_idle_tokens, shape.tokens)
            if 0 < measured_s < math.inf:
                self._read_alone.append((shape.tokens, measured_s))
        self._steps_since_decode_only = 0 if shape.prefill_work == 0 else self._steps_since_decode_only + 1
        if self._by_deadline is not None:
            self._by_deadline.observe(record)

    def _idle_tokens(self, view: StepView, ahead: Sequence[RequestView]) -> tuple[int, str]:
        """Return how many tokens a step without decodes reads, and why: nothing bounds it but who has read enough."""
        if self.model.ready:
            tokens, reason = self._largest(view, ahead, math.inf, view.max_tokens)
            if reason == "answer":
                return tokens, reason
        elif len(ahead) > 1:
            # One prompt shows how fast others are read; all of them at once, and a crowd's first tokens are late.
            return min(view.max_tokens, ahead[0].remaining_tokens), "cold"
        return view.max_tokens, "idle"

    def _prefill_tokens(
        self, view: StepView, ahead: Sequence[RequestView], longest_s: float
    ) -> tuple[int, str]:
        """Return how many prefill tokens go beside the decodes in a step of at most `longest_s`, and why."""
        room = view.max_tokens - view.decode_tokens
        if not ahead or room <= 0:
            return 0, "none"
        if not self.model.ready:
            # How long decodes take nobody knows yet: half of the promise is theirs.
            spare_s = 0.5 * (self.tbt_slo_s or 0.0) / self._steps_per_token
            return min(room, max(COLD_TOKENS, self._as_read_alone(spare_s))), "cold"
        decode_s = self._seconds(view, 0, 0.0, 0) if view.decodes else 0.0
        self._note_decode_step(decode_s)
        available_s = math.inf
        if view.generating:
            slo_s = self.tbt_slo_s
            if slo_s is None:
                return min(room, COLD_TOKENS), "cold"
            available_s = self.deadlines.available_s(view, slo_s)
        self.unkeepable = decode_s > available_s
        if self._steps_per_token > 1 and view.in_flight and not self.unkeepable:
            available_s = min(available_s, self._in_line_s(view, available_s))
        available_s = min(available_s, longest_s)
        if (
            view.decodes
            and self._steps_since_decode_only > DECODE_ONLY_EVERY_STEPS
            and (self.unkeepable or self.config.tbt_slo_ms is None)
        ):
            return 0, "probe"
        trusted = self._trusted_tokens(view, available_s - decode_s)
        even = self._even_tokens(view, ahead, room, decode_s)
        tokens, reason = self._largest(view, ahead, available_s, min(room, trusted, even))
        if reason == "limit" and min(trusted, even) < room:
            reason = "trust" if trusted < even else "even"
        if tokens > 0:
            self._steps_without_prefill = 0
            return tokens, reason
        self._steps_without_prefill += 1
        if self.unkeepable or not view.decodes or self._steps_without_prefill >= PATIENCE_STEPS:
            self._steps_without_prefill = 0
            return min(room, COLD_TOKENS), "floor"
        return 0, "full"

    def _in_line_s(self, view: StepView, available_s: float) -> float:
        """Return how long a batch may take in a pipeline for it and those after it to be in time."""
        gap_s = available_s * self._steps_per_token
        due_s = self.deadlines.last_delivery_s(view.now_s) + gap_s if view.decodes else math.inf
        return self._stages.longest_s(view.now_s, due_s, gap_s, view.in_flight)

    def _note_decode_step(self, decode_s: float) -> None:
        if decode_s > 0:
            known = self._decode_step_s
            self._decode_step_s = decode_s if known is None else 0.98 * known + 0.02 * decode_s

    def _trusted_tokens(self, view: StepView, spare_s: float) -> int:
        """Return the most prefill tokens that what has been seen so far speaks for, with `spare_s` beside decodes."""
        if not view.decodes:
            return max(COLD_TOKENS, int(GROWTH * self._most_idle_tokens))
        seen = int(GROWTH * self._most_tokens) - view.decode_tokens
        return max(COLD_TOKENS, seen, self._as_read_alone(spare_s))

    def _as_read_alone(self, spare_s: float) -> int:
        """Return the tokens that what was read alone speaks for, with `spare_s` beside decodes.

        The time of a step is a convex curve of its tokens: beside decodes, a part of what was read alone adds no more
        than its part of the time that took.
        """
        return int(max((n * min(1.0, spare_s / seconds) for n, seconds in self._read_alone), default=0.0))

    def _even_tokens(self, view: StepView, ahead: Sequence[RequestView], room: int, decode_s: float) -> int:
        """Return the tokens that give all batches in a pipeline an even part of what is to be read; `room` without one.

        A batch comes back when the longest beside it does (Sarathi-Serve, section 3.3: pipeline bubbles), so what fits
        beside the one before it costs nothing, and a prompt in parts goes through the stages side by side: m parts of
        what takes a stage T in all, each with d for the decodes, are out of p stages after (m + p - 1) (T / m + d).
        What is gained at the ends of a pipeline is gained by the n that are there; the d of each part puts off all who
        come while there is a queue, too (see `Backlog`). With P of those, the least wait is at
        m = sqrt((p - 1) T n / (d P)).
        """
        stages = self._steps_per_token
        if stages == 1:
            return room
        left = sum(request.remaining_tokens for request in ahead)
        fixed_s = decode_s if view.decodes else self._decode_step_s
        parts = float(stages)
        if fixed_s:
            work = sum(chunk_work(request.done_tokens, request.remaining_tokens) for request in ahead)
            reading_s = self._seconds(view, left, work, len(ahead)) - fixed_s
            payers = self._backlog.payers(len(ahead)) / max(1, len(ahead))
            parts = max(parts, math.sqrt((stages - 1) * max(0.0, reading_s) / (payers * fixed_s)))
        part = max(math.ceil(left / parts), self._last_prefill_tokens, LEAST_PART_TOKENS)
        # The rest of a tile costs nothing.
        return part + -(view.decode_tokens + part) % self.model.tile_tokens

    def _seconds(self, view: StepView, tokens: int, work: float, sequences: int) -> float:
        return self.model.seconds(
            view.decode_tokens + tokens,
            view.decodes,
            view.decode_context_tokens,
            work,
            view.decodes + sequences,
        )

    def _largest(
        self, view: StepView, ahead: Sequence[RequestView], available_s: float, most: int
    ) -> tuple[int, str]:
        """Return the most prefill tokens whose step is foretold to end in time, walking the prompts to be read."""
        limit_s = available_s / self.model.margin
        tokens, work = 0, 0.0
        for sequences, request in enumerate(ahead, start=1):
            whole = min(request.remaining_tokens, most - tokens)
            if whole <= 0:
                return tokens, "limit"
            done = request.done_tokens
            if self._seconds(view, tokens + whole, work + chunk_work(done, whole), sequences) > limit_s:
                chunk = self._largest_chunk(view, tokens, work, sequences, done, whole, limit_s)
                return tokens + self._shaped(view, tokens, work, sequences, request, chunk, limit_s), "slo"
            tokens += whole
            work += chunk_work(done, whole)
            if whole == request.remaining_tokens and self._answers_first(
                view, ahead, tokens, work, sequences
            ):
                return tokens, "answer"
        return tokens, "all"

    def _answers_first(
        self, view: StepView, ahead: Sequence[RequestView], tokens: int, work: float, prompts: int
    ) -> bool:
        """Tell whether ending the step here spares more waiting than it costs.

        The prompts that are read by now wait for all that is read after them in the same step; what one more step costs
        is waited for by those that are left, and by whoever comes while there is a queue.
        """
        if self._steps_per_token > 1:  # the batches of a pipeline wait for the longest of them anyway
            return False
        left = _left(view, ahead, prompts)
        if left <= 0:
            return False
        step_s = self._seconds(view, tokens, work, prompts)
        fixed_s = max(self._seconds(view, 0, 0.0, 0), FIXED_SHARE * (self._decode_step_s or 0.0))
        return prompts * (step_s - fixed_s) > self._backlog.payers(left) * fixed_s

    def _largest_chunk(
        self, view: StepView, tokens: int, work: float, sequences: int, done: int, whole: int, limit_s: float
    ) -> int:
        low, high = 0, whole  # low fits or is nothing, high does not fit
        while high - low > 1:
            middle = (low + high) // 2
            if self._seconds(view, tokens + middle, work + chunk_work(done, middle), sequences) <= limit_s:
                low = middle
            else:
                high = middle
        return low

    def _shaped(
        self,
        view: StepView,
        tokens: int,
        work: float,
        sequences: int,
        request: RequestView,
        chunk: int,
        limit_s: float,
    ) -> int:
        """Round a chunk to whole tiles, or up to the end of its prompt, where that costs less than it gains."""
        left = request.remaining_tokens - chunk
        if 0 < left <= TAIL_SHARE * chunk:
            whole_work = work + chunk_work(request.done_tokens, request.remaining_tokens)
            if (
                self._seconds(view, tokens + request.remaining_tokens, whole_work, sequences)
                <= TAIL_OVERRUN * limit_s
            ):
                return request.remaining_tokens
        over = (view.decode_tokens + tokens + chunk) % TILE_TOKENS
        return chunk - over if over <= ALIGNMENT_LOSS * chunk else chunk

    def _longest_step_s(self) -> float:
        if self._by_deadline is None:
            return math.inf
        return self._by_deadline.longest_step_s(self._decode_step_s or 0.0, self.tbt_slo_s)

    def _planned(self, prefill_tokens: int) -> None:
        self._last_prefill_tokens = prefill_tokens
        if self._by_deadline is not None:
            self._by_deadline.planned(prefill_tokens)

    def _order(self, view: StepView) -> Order:
        """Return whose turn it is."""
        if self._by_deadline is None or not (view.prefills or view.waiting):
            return Order(arrival_order(view))
        return self._by_deadline.order(view)


def _left(view: StepView, ahead: Sequence[RequestView], read: int) -> int:
    """Return how many prompts are there besides the first `read` of those ahead."""
    return len(ahead) - read + max(0, view.unseen_waiting - 1)


def _prompts_within(ahead: Sequence[RequestView], tokens: int) -> int:
    """Return how many of the prompts ahead are read to their end by so many tokens."""
    for read, request in enumerate(ahead):
        tokens -= request.remaining_tokens
        if tokens < 0:
            return read
    return len(ahead)
