"""What the controller sees: vLLM's queues as a StepView, and the requests behind it."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.chunk_rules import ChunkRules
from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.figures import DEFAULT_CLASS
from vllm_sarathi.core.order.base import Facts
from vllm_sarathi.core.order.yielding import Holding, Wanting, giving_way
from vllm_sarathi.core.types import DecodeView, InFlight, Occupancy, RequestView, StepView
from vllm_sarathi.engine.company import Company
from vllm_sarathi.engine.request_slo import NOTHING, read_asked_slo
from vllm_sarathi.engine.turns import RefusedTurns
from vllm_sarathi.engine.vllm.chunking import Chunking
from vllm_sarathi.engine.vllm.images import encoder_inputs
from vllm_sarathi.engine.vllm.internals import is_priority_policy
from vllm_sarathi.engine.vllm.limits import most_of_one
from vllm_sarathi.engine.vllm.preemption import can_preempt, freed_blocks
from vllm_sarathi.engine.vllm.prefix_cache import CachedPrefixes, reader_of
from vllm_sarathi.engine.vllm.protocols import Request
from vllm_sarathi.engine.vllm.runnable import Admission, Blocker
from vllm_sarathi.engine.vllm.turn_queue import install_turn_queue

FOR_ROOM = (Blocker.SLOT, Blocker.BLOCKS)
"""What batch work that gives way can help with."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A step as the controller sees it, and as vLLM holds it.

    Attributes:
        view: what the controller sees.
        partial: the requests behind `view.prefills`.
        waiting: the requests behind `view.waiting`.
        pressing: one that nobody may pass, and that waits for KV blocks: the next in the queue after those.
        yielding: running batch work to preempt before the step, as others wait for its room.
    """

    view: StepView
    partial: list[Request]
    waiting: list[Request]
    pressing: list[Request]
    yielding: list[Request]


class ViewBuilder:
    """Looks at a scheduler before each step.

    Args:
        scheduler: vLLM's, and ours.
        config: the settings.
        controller: says what it wants to see.
        chunking: where prompts may be cut.
        stepwise_pipeline: whether a decode waits for its last token to come out of a pipeline.

    Attributes:
        company: who runs, by what they are bound to.
        transfers: whether some wait for what a connector brings, and it has not been asked yet.
    """

    def __init__(
        self,
        scheduler: Any,
        config: SarathiConfig,
        controller: StepController,
        chunking: Chunking,
        stepwise_pipeline: bool,
    ) -> None:
        self._scheduler = scheduler
        self._config = config
        self._controller = controller
        self._pipelined = stepwise_pipeline
        self._by_priority = is_priority_policy(scheduler)
        self._looks_far = bool(controller.order.lists) and not self._by_priority
        self._prefixes = CachedPrefixes(scheduler)
        self._chunking = chunking
        self._refused = RefusedTurns()
        self._room_made = RefusedTurns()
        self._made_room_for: list[Request] = []
        self.company = Company()
        self._relegated: set[str] = set()
        self._batch_classes = config.slo_classes is not None and config.slo_classes.has_batch
        self.transfers = False
        self._keyed_tokens: dict[str, int] = {}
        self._cached_at_start: dict[str, int] = {}
        self._step = 0
        if self._looks_far:
            self._install_queue()

    def _install_queue(self) -> None:
        scheduler = self._scheduler
        install_turn_queue(scheduler, self._controller.order, self._keys, scheduler.faults.note)

    def reconfigure(self, config: SarathiConfig) -> None:
        """Go by other settings, which the controller has already."""
        self._config = config
        looked_far = self._looks_far
        self._looks_far = bool(self._controller.order.lists) and not self._by_priority
        if looked_far or self._looks_far:  # the keys of those who wait are others now
            self._install_queue()

    def added(self, request: Request) -> None:
        """Note a new request, and the SLOs that it asks for; called before it is queued."""
        self._controller.arrived(request.request_id, request.max_tokens)
        extra_args = getattr(request.sampling_params, "extra_args", None)
        if self._config.slo_classes is not None:
            asked = read_asked_slo(extra_args, self._config)
            self.company.bind(request.request_id, self._controller.bind(asked, self._left(request)))
        elif self._config.allow_request_slo:
            asked = read_asked_slo(extra_args, self._config)
            if asked is not NOTHING:
                self.company.bind(request.request_id, Bond(asked.tbt_slo_s, asked.ttft_slo_s))

    def ended(self, request: Request) -> None:
        """Learn from a request that has ended, and forget it."""
        self._controller.ended(request.request_id, request.num_prompt_tokens, request.num_output_tokens)
        self.company.ended(request.request_id)
        for notes in (self._keyed_tokens, self._cached_at_start):
            notes.pop(request.request_id, None)
        self._relegated.discard(request.request_id)
        self._refused.forget(request.request_id)
        self._room_made.forget(request.request_id)

    def slo_class(self, request: Request) -> str:
        """Return the class of a request."""
        slo_class = self.bond(request).slo_class
        return DEFAULT_CLASS if slo_class is None else slo_class.name

    def ttft_slo_s(self, request: Request) -> float | None:
        """Return a request's SLO for its time to first token, seconds; None without one."""
        own_s = self.bond(request).ttft_slo_s
        if own_s is None and self._config.ttft_slo_ms is not None:
            return self._config.ttft_slo_ms / 1e3
        return own_s

    def newly_relegated(self) -> list[str]:
        """Return the classes of those that the step planned last has relegated for the first time."""
        if not self._controller.relegated:
            return []
        new = self._controller.relegated - self._relegated
        self._relegated |= new
        return [self.slo_class(self._scheduler.requests[name]) for name in new]

    def note_turn(self, request: Request, taken: bool) -> None:
        """Note whether a request that others yielded to has used its turn."""
        self._refused.note(request.request_id, taken, self._step)

    def note_room(self, scheduled: Mapping[str, int]) -> None:
        """Note which of those for whom room was made have used it: it is not made for the others step by step."""
        for request in self._made_room_for:
            self._room_made.note(request.request_id, request.request_id in scheduled, self._step)
        self._made_room_for = []

    def look(self, now_s: float, wall_s: float, in_flight: Iterable[InFlight], yields: bool = True) -> Sight:
        """Return the step at hand.

        Args:
            now_s: the time on the clock of StepView.now_s.
            wall_s: seconds since the epoch, as vLLM notes arrivals.
            in_flight: as StepView.in_flight.
            yields: whether batch work may give way in this step.
        """
        scheduler, policy = self._scheduler, self._controller.policy
        running = scheduler.running
        partial = [request for request in running if request.is_prefill_chunk]
        generating = decodes = len(running) - len(partial)
        if self._pipelined:  # a decode whose last token is still in the pipeline cannot be in this step
            running = [r for r in running if r.is_prefill_chunk or r.num_tokens > r.num_computed_tokens]
            decodes = len(running) - len(partial)
        decode_tokens = decodes
        if scheduler.num_spec_tokens:
            decode_tokens += sum(len(r.spec_token_ids) for r in running if not r.is_prefill_chunk)
        context = sum([r.num_computed_tokens for r in running])
        if partial:
            context -= sum([r.num_computed_tokens for r in partial])
        classes = self._config.slo_classes is not None
        tbt_slos_s: tuple[float | None, ...] = ()
        if policy.needs_tbt_slos or classes:
            self.company.look(scheduler.running, partial)
            tbt_slos_s = self.company.tbt_slos_s
        admission = Admission(scheduler, decodes)
        queued = scheduler.get_request_counts()[1]
        waiting, pressing, unseen, short = self._waiting(queued, admission, partial, wall_s)
        views: tuple[DecodeView, ...] = ()
        if policy.needs_decode_views:
            views = tuple(self._decode_view(r) for r in scheduler.running if not r.is_prefill_chunk)
        to_prefill = partial or waiting or (unseen and admission.free_slots)
        view = StepView(
            now_s=now_s,
            decodes=decodes,
            decode_tokens=decode_tokens,
            decode_context_tokens=context,
            prefills=tuple([self._partial_view(request, wall_s) for request in partial]),
            waiting=tuple([self._waiting_view(request, wall_s, partial) for request in waiting]),
            max_tokens=scheduler.max_num_scheduled_tokens,
            unseen_waiting=unseen,
            decode_views=views,
            decodes_elsewhere=generating - decodes,
            in_flight=tuple(in_flight) if self._pipelined or policy.needs_decode_views else (),
            free_slots=admission.free_slots,
            closed=admission.paused,
            tbt_slos_s=tbt_slos_s,
            occupancy=self._occupancy(admission) if classes and to_prefill else None,
            blocked=self._blocked(queued, admission),
            most_of_one=most_of_one(scheduler),
        )
        yielding = self._yielding(short, admission) if short and yields else []
        return Sight(view, partial, waiting, pressing, yielding)

    def _waiting(
        self, count: int, admission: Admission, partial: list[Request], wall_s: float
    ) -> tuple[list[Request], list[Request], int, list[Request]]:
        """Return the waiting requests that the order wants to see.

        Those that could be scheduled, the one that nobody may pass, how many others there are, and those that would be
        scheduled if batch work gave way.
        """
        scheduler, order = self._scheduler, self._controller.order
        self.transfers = False
        if not count or not (admission.free_slots or self.company.batch):
            return [], [], count, []
        if self._looks_far:
            seen = scheduler.waiting.candidates(order.starts(wall_s))
        else:
            seen = list(itertools.islice(scheduler.waiting, self._controller.policy.waiting_seen))
            if order.sees_one_step and self._controller.policy.learns:
                seen = self._within_one_step(partial, seen)
        self._step += 1
        self._prefixes.refresh(seen)
        if self._looks_far:
            for request in seen:
                if self._left(request) != self._keyed_tokens.get(request.request_id):
                    scheduler.waiting.rekey(request)
        waiting, claimed, short, pressing = [], set(), [], []
        for request in seen:
            blocker = admission.blocker(request, self._prefixes.tokens(request))
            if self.company.batch and blocker in FOR_ROOM and self._may_ask_for_room(request, admission):
                short.append(request)
            if blocker is None and not self._refused.is_passed_over(request.request_id, self._step):
                waiting.append(request)
            elif blocker is Blocker.TRANSFER:
                self.transfers = True
            elif blocker is Blocker.BLOCKS and self._presses(request, wall_s):
                pressing = [request]
                if not self.bond(request).batch:  # the lists have shown some before it that it goes before
                    waiting = [other for other in waiting if self._presses(other, wall_s)]
                break
            elif blocker is Blocker.BLOCKS and self._controller.claims(self.bond(request)):
                claimed.add(self.bond(request).slo_class)
        if claimed:
            waiting = [request for request in waiting if self._may_pass(self.bond(request), claimed)]
        unseen = max(0, count - len(seen)) if admission.free_slots else count
        return waiting, pressing, unseen, short

    def _may_ask_for_room(self, request: Request, admission: Admission) -> bool:
        """True for a waiting request that batch work gives way to."""
        if self.bond(request).batch or self._room_made.is_passed_over(request.request_id, self._step):
            return False
        return admission.waits_for_room(request, self._prefixes.tokens(request))

    def _yielding(self, short: list[Request], admission: Admission) -> list[Request]:
        """Return the batch work to preempt for the requests that wait for room, the last to run first."""
        scheduler = self._scheduler
        holding = [
            Holding(request, freed_blocks(scheduler, request))
            for request in reversed(scheduler.running)
            if request.request_id in self.company.batch
            and self._controller.gives_way(request.request_id)
            and can_preempt(scheduler, request)
        ]
        wanting = [
            Wanting(
                request,
                request.arrival_time + (self.bond(request).ttft_slo_s or math.inf),
                request.arrival_time,
                admission.wanted_blocks(request),
                self._left(request),
            )
            for request in short
        ]
        self._made_room_for, yielding = giving_way(
            wanting,
            holding,
            admission.free_slots,
            admission.unclaimed_blocks(),
            scheduler.max_num_scheduled_tokens,
        )
        return yielding

    def _may_pass(self, bond: Bond, claimed: set[SloClass | None]) -> bool:
        """True where a request takes no room for which one of another tenant waits, that has had less."""
        return not bond.batch and (bond.slo_class not in claimed or self._controller.claims(bond))

    def _blocked(self, count: int, admission: Admission) -> int:
        """Return how many requests wait for slots or KV blocks of others, if those at the head of the queue do."""
        # Batch work waits for what it is not to have: no step is cut short for it.
        if not count or not self._controller.policy.learns or self._batch_classes:
            return 0
        head = list(itertools.islice(self._scheduler.waiting, self._controller.policy.waiting_seen))
        fitting = admission.fitting(head)
        return count - fitting if fitting < len(head) else 0

    def _presses(self, request: Request, wall_s: float) -> bool:
        """True for a request that nobody may pass while it waits for KV blocks."""
        return self._controller.order.presses(
            self.bond(request),
            wall_s - request.arrival_time,
            request.request_id,
            request.num_output_tokens > 0,
        )

    def _within_one_step(self, partial: list[Request], waiting: Iterable[Request]) -> list[Request]:
        """Return the first of `waiting`, as many as a step of the engine's limit can reach after `partial`.

        By priority, whoever waits may go before those.
        """
        room = self._scheduler.max_num_scheduled_tokens
        most = most_of_one(self._scheduler)
        if not self._by_priority:
            room -= sum(min(most, request.num_tokens - request.num_computed_tokens) for request in partial)
        reached = []
        for request in waiting:
            if room <= 0:
                break
            room -= min(most, request.num_tokens - self._prefixes.tokens(request))
            reached.append(request)
        return reached

    def bond(self, request: Request) -> Bond:
        """Return what a request is bound to."""
        return self.company.bond(request)

    def cached_tokens(self, request: Request) -> int:
        """Return how much of a waiting request is in the prefix cache."""
        return self._prefixes.tokens(request)

    def _occupancy(self, admission: Admission) -> Occupancy:
        batch = self.company.batch
        held = sum([request.num_computed_tokens for request in batch.values()])
        return Occupancy(len(batch), held, admission.free_tokens(), self.company.tenants)

    def _request_view(
        self,
        request: Request,
        wall_s: float,
        done: int,
        cached: int,
        left: tuple[int, ChunkRules],
        reader: int | None = None,
    ) -> RequestView:
        bond = self.bond(request)
        return RequestView(
            request_id=request.request_id,
            rank=(request.priority if self._by_priority else 0, request.arrival_time),
            age_s=max(0.0, wall_s - request.arrival_time),
            done_tokens=done,
            remaining_tokens=left[0],
            ttft_slo_s=bond.ttft_slo_s,
            cached_tokens=cached,
            rules=left[1],
            encoder_inputs=(
                encoder_inputs(self._scheduler, request, done) if request.has_encoder_inputs else ()
            ),
            slo_class=bond.slo_class,
            tenant=bond.tenant,
            tag=bond.tag,
            answering=request.num_output_tokens > 0,
            reader=reader,
        )

    def _partial_view(self, request: Request, wall_s: float) -> RequestView:
        # A preemption or a reset of the prefix cache may have taken the prefix away.
        done = request.num_computed_tokens
        cached = min(self._cached_at_start.get(request.request_id, 0), done)
        left = max(1, request.num_tokens - done), self._chunking.rules(request, done)
        return self._request_view(request, wall_s, done, cached, left)

    def _waiting_view(self, request: Request, wall_s: float, partial: list[Request]) -> RequestView:
        done = self._prefixes.tokens(request)
        self._cached_at_start[request.request_id] = done
        reader = reader_of(self._scheduler, request, done, partial) if partial else None
        left = self._chunking.beginning(request, done)
        return self._request_view(request, wall_s, done, done, left, reader)

    def _left(self, request: Request) -> int:
        return max(1, int(request.num_tokens) - self._prefixes.tokens(request))

    def _decode_view(self, request: Request) -> DecodeView:
        tokens = request.num_output_tokens + request.num_output_placeholders
        return DecodeView(request.request_id, tokens, self.bond(request).tbt_slo_s)

    def _keys(self, request: Request) -> Any:
        left = self._keyed_tokens[request.request_id] = self._left(request)
        bond = self.bond(request)
        facts = Facts(
            request.arrival_time,
            left,
            bond.ttft_slo_s,
            bond.slo_class,
            bond.tag,
            bond.tenant,
            answering=request.num_output_tokens > 0,
        )
        return self._controller.order.keys(facts)
