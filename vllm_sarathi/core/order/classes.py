"""The order of `--slo-classes`: deadlines as in `deadline`, with classes, shares of tenants, and batch work last.

    0. *overdue*, in every second step: waited longer than the bound, within the share of its tenant; or batch work that
       has made no progress for its own bound.
    1. *with an SLO*: a time to first token that can be met, or that cannot if the class is served late.
    2. *relegated*: cannot be kept any more.
    3. *the rest*: without an SLO.
    4. *batch*.
    5. *left out*: its tenant has more running than its share, and slots or KV blocks are short.

Which SLOs are given up follows from the classes' weights (`first_token.keep`). If a class has work of several tenants,
its places go to them by their shares: the earliest to the tenant that has had the least (`shares`).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.first_token import Job, keep
from vllm_sarathi.core.order.base import ANSWERING_SEEN, Facts, Turn, turn_by_keys
from vllm_sarathi.core.order.deadline import (
    ARRIVAL_DECODE_STEPS,
    ARRIVAL_STEPS,
    OCTAVE_SEEN,
    OCTAVES,
    STRETCH,
    DeadlineOrder,
    Key,
)
from vllm_sarathi.core.order.pace import ReadingPace
from vllm_sarathi.core.order.shares import Shares
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import Pipeline, RequestView, StepRecord, StepView

OLDEST_SEEN = 8
DUE_SEEN = 32
LATE_SEEN = 16
TAG_SEEN = 8
AHEAD_SEEN = 8
BATCH_SEEN = 8
"""How many of those that wait are looked at: the oldest, the next due, the next due among those that are served late,
in each class those of the tenants who have had the least, and those of the tenants who had the least waiting when they
came: else a tenant that floods, and may not be admitted, would hide all others."""

RELEGATED = 2
"""The place of those that cannot be kept any more; see above."""

SPARE_SHARE = 1 / 8
CROWDED_STEP_SHARE = 0.4
"""Of slots and KV cache, a share is kept free of tenants that have more running than their part, for those that have
less; and decodes alone may take a share of the tightest time between tokens before no more of theirs are let in."""

MOST_PAID_S = 1.0
"""For one step a tenant that is kept out pays no more than that: the time may have been one of no steps at all."""


class ClassOrder(DeadlineOrder):
    """Orders the prompts of each step by class, deadline and share.

    Args:
        config: the settings, with classes.
        model: tells how long prefill takes, until enough has been seen to know.
        pipeline: the stages of the device.

    Attributes:
        relegated: the requests of the step at hand that cannot be kept any more, and give way for it.
    """

    def __init__(self, config: SarathiConfig, model: StepTimeModel, pipeline: Pipeline) -> None:
        super().__init__(config, model, pipeline)
        self.relegated: frozenset[str] = frozenset()
        classes = config.slo_classes
        assert classes is not None
        self._shares = {each.name: Shares() for each in classes.classes}
        self._batch_read_s: dict[str, float] = {}
        self._has_batch = classes.has_batch
        self._now_s = 0.0
        self._no_room = False
        self._prompts: list[RequestView] = []
        self._overdue: Set[str] = frozenset()
        self._begun_overdue: set[str] = set()
        self._late: set[str] = set()
        self._pace = ReadingPace(model, pipeline)
        self.reconfigure(config)
        self._kept_out: dict[str, set[str]] = {}
        self.lists: Mapping[str, int] = {
            "answering": ANSWERING_SEEN,
            "arrival": OLDEST_SEEN,
            "due": DUE_SEEN,
            "late": LATE_SEEN,
            **{f"octave {i}": OCTAVE_SEEN for i in range(OCTAVES)},
            **{f"tag {each.name}": BATCH_SEEN if each.batch else TAG_SEEN for each in classes.classes},
            **{f"ahead {each.name}": AHEAD_SEEN for each in classes.classes if not each.batch},
        }

    def reconfigure(self, config: SarathiConfig) -> None:
        """Go by other SLOs and bounds; whose turn it is stays, and the names of the classes, too."""
        classes = config.slo_classes
        assert classes is not None
        self._max_wait_s = config.prefill_max_wait_s
        self._least_tbt_slo_s = self._pipeline.step_s(classes.least("tbt_slo_s"))
        self._pace.least_tbt_slo_s = self._least_tbt_slo_s
        self._least_class_ttft_s = classes.least("ttft_slo_s")

    def tag(self, slo_class: SloClass, tenant: str, tokens: int) -> float:
        """Return the place of a new request among the tenants of its class, and charge its tenant for it."""
        return self._shares[slo_class.name].tag(tenant, self._prefill_s(0, tokens), self._now_s)

    def keys(self, facts: Facts) -> Mapping[str, float]:
        """Return when it arrived, when it is due, its octave, its tag, and how far that is ahead of its class.

        Of batch work, its tag alone.
        """
        assert facts.slo_class is not None
        keys = {f"tag {facts.slo_class.name}": facts.tag}
        if facts.slo_class.batch:
            return keys
        octave = min(OCTAVES - 1, facts.remaining_tokens.bit_length())
        keys |= {"arrival": facts.arrival_s, f"octave {octave}": facts.arrival_s}
        shares = self._shares[facts.slo_class.name]
        keys[f"ahead {facts.slo_class.name}"] = shares.place(facts.tenant, facts.tag) - shares.now_s
        if facts.ttft_slo_s is not None:
            keys["late" if facts.slo_class.when_late == "serve" else "due"] = (
                facts.arrival_s + facts.ttft_slo_s
            )
        if facts.answering:
            keys["answering"] = facts.arrival_s
        return keys

    def longest_step_s(self, decode_step_s: float, tbt_slo_s: float | None) -> float:
        """Return the longest step that gives a new request of the most urgent class its first token in time."""
        least_s = self._pipeline.step_s(self._least_class_ttft_s / ARRIVAL_STEPS)
        return max(least_s, ARRIVAL_DECODE_STEPS * decode_step_s)

    def turn(self, view: StepView) -> Turn:
        """Return whose turn it is in the step at hand."""
        requests = (*view.prefills, *view.waiting)
        self._charge(view.now_s - self._now_s)
        self._now_s = view.now_s
        self._pace.look(view)
        # Batch work waits for room that it is not to have: that says nothing of those with an SLO.
        self._no_room = not (requests or self._has_batch) and view.unseen_waiting > 0
        if not requests:  # all slots are taken, as in most steps under load: the same answer without its cost
            self._kept_out, self.relegated, self._prompts = {}, frozenset(), []
            return Turn((), waiting=())
        starving = self._starving(requests)
        shared = self._shared(requests)
        keys = self._by_share(requests, self._keys(requests, starving, shared), shared)
        for index, request in enumerate(requests):
            relegated = keys[index][0] == RELEGATED
            if not request.answering:
                (self._late.add if relegated else self._late.discard)(request.request_id)
            elif not request.batch and not (relegated and request.request_id in self._late):
                keys[index] = (-1, -request.age_s, float(index))  # its next token is late already
        left_out = self._left_out(view, requests, keys)
        self._kept_out = {}
        for index in left_out:
            keys[index] = (5, *keys[index][1:])
            if (slo_class := requests[index].slo_class) is not None:
                self._kept_out.setdefault(slo_class.name, set()).add(requests[index].tenant)
        self.relegated = frozenset(
            [r.request_id for r, key in zip(requests, keys, strict=True) if key[0] == RELEGATED]
        )
        turn = turn_by_keys(view, keys)
        if starving or left_out:  # seldom; and a copy is slow
            names = [frozenset(requests[i].request_id for i in chosen) for chosen in (starving, left_out)]
            turn = replace(turn, overdue=names[0], left_out=names[1])
        self._prompts = turn.prompts(view) if self._has_batch else []
        self._overdue = turn.overdue
        return turn

    def planned(self, prefill_tokens: int) -> None:
        """Note what the step is going to prefill, and which batch work."""
        super().planned(prefill_tokens)
        for request in self._prompts:
            if prefill_tokens <= 0:
                break
            if request.batch and request.request_id in self._overdue:
                self._begun_overdue.add(request.request_id)
            prefill_tokens -= request.remaining_tokens
            # What has begun because it stood still goes on until it is prefilled: one chunk is no progress to anybody.
            if prefill_tokens >= 0 and request.slo_class is not None and request.slo_class.batch:
                self._batch_read_s[request.slo_class.name] = self._now_s
        self._prompts = []

    def gives_way(self, request_id: str) -> bool:
        """True for batch work that may be preempted: not for what was begun as its class had stood still too long."""
        return request_id not in self._begun_overdue

    def ended(self, request_id: str) -> None:
        """Forget a request."""
        self._begun_overdue.discard(request_id)
        self._late.discard(request_id)

    def presses(self, bond: Bond, age_s: float, request_id: str, answering: bool) -> bool:
        """Return whether a request is in the middle of an answer that goes before all, or has waited for its bound."""
        assert bond.slo_class is not None
        if bond.slo_class.batch:
            return self.starves(bond.slo_class, age_s)
        if answering and request_id not in self._late:
            return True
        return age_s >= self._max_wait_s and self._is_owed(bond.slo_class, bond.tenant, bond.tag)

    def claims(self, bond: Bond) -> bool:
        """True for a request that goes before those of other tenants where there is room for one."""
        shares = None if bond.slo_class is None else self._shares[bond.slo_class.name]
        if shares is None or shares.tenants(self._now_s) < 2:
            return False
        return shares.is_owed(shares.place(bond.tenant, bond.tag))

    def _is_owed(self, slo_class: SloClass, tenant: str, tag: float) -> bool:
        """True for what is within the share of its tenant; in a class of one, for all there is."""
        shares = self._shares[slo_class.name]
        return shares.is_owed(shares.place(tenant, tag)) or shares.tenants(self._now_s) < 2

    def _charge(self, seconds: float) -> None:
        """Have the tenants that the last step let nobody of in pay for the time since then."""
        for name, tenants in self._kept_out.items():
            for tenant in tenants:
                self._shares[name].pay(tenant, min(seconds, MOST_PAID_S))

    def _place(self, request: RequestView) -> float:
        """Return where a request stands by the shares of the tenants of its class."""
        assert request.slo_class is not None
        return self._shares[request.slo_class.name].place(request.tenant, request.tag)

    def _left_out(self, view: StepView, requests: Sequence[RequestView], keys: Sequence[Key]) -> list[int]:
        """Return those that are not let in, as their tenant has more running than its part, and others need room."""
        held = view.occupancy
        if held is None or len(view.waiting) == 0:
            return []
        running = in_all = view.generating + len(view.prefills)
        inside = len(view.prefills)
        parts: dict[str, int] = {}
        crowding = set()
        for index, request in enumerate(view.waiting, inside):
            count = held.tenants.get(request.tenant, 0)
            if not count or request.slo_class is None:
                continue
            name = request.slo_class.name
            if (part := parts.get(name)) is None:
                part = parts[name] = self._shares[name].tenants(self._now_s)
            if part > 1 and count * part > in_all:
                crowding.add(index)
        if not crowding:
            return []
        slots = view.free_slots
        spare_slots = SPARE_SHARE * (running + slots)
        read = sum(request.remaining_tokens for request in view.prefills)
        free = held.free_kv_tokens - read
        done = sum(request.done_tokens for request in view.prefills)
        spare_tokens = SPARE_SHARE * (held.free_kv_tokens + view.decode_context_tokens + done)
        left_out = []
        context = view.decode_context_tokens + done + read
        for index in sorted(range(inside, len(requests)), key=keys.__getitem__):
            request, crowds = requests[index], index in crowding
            needed = request.done_tokens + request.remaining_tokens
            count, read_by = running + 1, context + needed
            step_s = self._model.seconds(count, count, read_by, 0.0, count) if crowds else 0.0
            long = step_s > CROWDED_STEP_SHARE * self._least_tbt_slo_s
            if crowds and (long or slots - 1 < spare_slots or free - needed < spare_tokens):
                left_out.append(index)
            else:
                slots, free, running, context = slots - 1, free - needed, count, read_by
        return left_out

    def starves(self, slo_class: SloClass, age_s: float) -> bool:
        """True for batch work that has waited for its bound, while no prompt of its class was prefilled to its end."""
        still_s = self._now_s - self._batch_read_s.get(slo_class.name, -math.inf)
        return slo_class.batch and min(age_s, still_s) >= slo_class.max_wait_s

    def pace(self) -> tuple[float, float, float] | None:
        """Return the seconds of prefill per token and per token pair, and the lead; None while nothing is known."""
        if self._token_s is None:
            return None
        token_s = self._pace.token_s(self._token_s)
        return token_s, self._model.work_s, self._pipeline.token_s(self._step_s)

    def pace_alone(self, tokens: int) -> tuple[float, float, float] | None:
        """Return `pace` for a prompt of a length on a device that does nothing else: there is no lead then."""
        token_s = self._pace.token_alone_s(tokens)
        return None if token_s is None else (token_s, self._model.work_s, 0.0)

    def observe(self, record: StepRecord) -> None:
        """Learn from a finished step how fast prompts are prefilled, and how fast while there are any that wait."""
        super().observe(record)
        self._pace.observe(record, self._no_room)

    def _starving(self, requests: Sequence[RequestView]) -> list[int]:
        """Return the batch work, one of each class, that has stood still for its bound, by index."""
        first: dict[str, int] = {}
        for index, request in enumerate(requests if self._has_batch else ()):
            slo_class = request.slo_class
            if slo_class is not None and self.starves(slo_class, request.age_s):
                best = first.setdefault(slo_class.name, index)
                if request.tag < requests[best].tag:
                    first[slo_class.name] = index
        return list(first.values())

    def _keys(self, requests: Sequence[RequestView], starving: Sequence[int], shared: Set[str]) -> list[Key]:
        """Return each request's place by class and deadline; smaller goes first."""
        jobs, indices = self._jobs(requests, bool(starving), shared)
        kept = {}
        for place in keep(jobs, self._pipeline.token_s(self._step_s)):
            kept[indices[place]] = (1, jobs[place].due_s, jobs[place].prefill_s)
        keys: list[Key] = []
        for index, request in enumerate(requests):
            # One of its class in each bound: others hardly notice.
            if self._overdue_first and index in starving:
                keys.append((0, -math.inf, float(index)))
                continue
            if self._overdue_first and self._is_overdue(request):
                keys.append((0, -request.age_s, float(index)))
                continue
            if index in kept:
                keys.append(kept[index])
                continue
            left_s = self._prefill_s(request.done_tokens, request.remaining_tokens)
            if request.batch:
                keys.append((4, request.tag, left_s))
            else:
                own = request.done_tokens - request.cached_tokens
                total_s = left_s + self._prefill_s(request.cached_tokens, own)
                weight = 1.0 if request.slo_class is None else request.slo_class.weight
                rank = 3 if request.ttft_slo_s is None else 2
                keys.append((rank, STRETCH * total_s / weight - request.age_s, left_s))
        return keys

    def _jobs(
        self, requests: Sequence[RequestView], starving: bool, shared: Set[str]
    ) -> tuple[list[Job], list[int]]:
        """Return the prompts with an SLO, and which of the requests they are."""
        overdue = starving or any(self._is_overdue(request) for request in requests)
        factor = 2.0 if overdue else 1.0  # while some are overdue, half of the steps are theirs
        jobs, indices = [], []
        for index, request in enumerate(requests):
            slo_class = request.slo_class
            if request.ttft_slo_s is None or slo_class is None or slo_class.batch:
                continue
            due_s = request.ttft_slo_s - request.age_s
            stays = slo_class.when_late != "relegate"  # it was admitted with an SLO
            if due_s <= 0 and not stays:
                continue
            prefill_s = factor * self._prefill_s(request.done_tokens, request.remaining_tokens)
            cost_s = max(prefill_s, 1e-9) / slo_class.weight
            beyond = slo_class.name in shared and self._shares[slo_class.name].is_beyond(self._place(request))
            jobs.append(Job(due_s, prefill_s, stays=stays, loss=-cost_s if beyond else 1 / cost_s))
            indices.append(index)
        return jobs, indices

    def _is_overdue(self, request: RequestView) -> bool:
        if request.batch or request.age_s < self._max_wait_s:
            return False
        return request.slo_class is None or self._is_owed(request.slo_class, request.tenant, request.tag)

    def _shared(self, requests: Sequence[RequestView]) -> set[str]:
        """Return the classes in which several tenants have work, and let each class's time go on."""
        first: dict[str, str] = {}
        least: dict[str, float] = {}
        shared = set()
        for request in requests:
            if (slo_class := request.slo_class) is not None:
                name, tag = slo_class.name, self._place(request)
                if first.setdefault(name, request.tenant) != request.tenant:
                    shared.add(name)
                if tag < least.get(name, math.inf):
                    least[name] = tag
        for name, tag in least.items():
            self._shares[name].seen(tag)
        return shared

    def _by_share(self, requests: Sequence[RequestView], keys: list[Key], shared: Set[str]) -> list[Key]:
        """Give the places that a class has within each rank to its tenants by their shares."""
        if not shared:
            return keys
        groups: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if (
                request.slo_class is not None
                and request.slo_class.name in shared
                and keys[index][0] in (1, 2, 3)
            ):
                groups[request.slo_class.name, keys[index][0]].append(index)
        placed = list(keys)
        for group in groups.values():
            by_tag = sorted(group, key=lambda i: (self._place(requests[i]), keys[i]))
            for index, place in zip(by_tag, sorted(keys[i] for i in group), strict=True):
                placed[index] = place
        return placed
