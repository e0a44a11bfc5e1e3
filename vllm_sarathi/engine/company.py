"""What those that run are bound to: who comes or goes changes the counts, and every step reads them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.figures import DEFAULT_CLASS, ClassGaps
from vllm_sarathi.core.types import Pipeline
from vllm_sarathi.engine.vllm.protocols import Request

FREE = Bond()
"""What a request without an SLO of its own is bound to."""


GapKind = tuple[str, float | None]
"""A class, and the time between tokens of its own that a request has, seconds; as in `Bond`."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Kind:
    """What requests have in common that are counted as one. Told apart by identity: a hash of all this is slow."""

    gap: GapKind
    tenant: str
    batch: bool


@dataclass(frozen=True, slots=True)
class Gaps:
    """The gaps that a step ends, by class and by SLO; worked out by who looks at them, which is not the engine's loop.

    Attributes:
        counts: how many of each kind; never changed.
        tbt_slo_s: the server's own time between tokens, seconds; None for none.
        pipeline: the stages of the device.
    """

    counts: Mapping[GapKind, int]
    tbt_slo_s: float | None
    pipeline: Pipeline

    def __iter__(self) -> Iterator[ClassGaps]:
        merged: dict[GapKind, int] = {}
        for (name, own_s), count in self.counts.items():
            slo_s = self.tbt_slo_s if own_s is None else own_s
            key = name, slo_s if slo_s is not None and math.isfinite(slo_s) else None
            merged[key] = merged.get(key, 0) + count
        for (name, slo_s), count in merged.items():
            yield ClassGaps(name, count, None if slo_s is None else self.pipeline.step_s(slo_s))


class Company:
    """Who runs, by what they are bound to.

    Attributes:
        tbt_slos_s: the different times between tokens of those that generate, as in `StepView`.
        tenants: how many requests of each tenant run.
        batch: the batch work that runs, by name, in no order.
    """

    def __init__(self) -> None:
        self.tbt_slos_s: tuple[float | None, ...] = ()
        self.tenants: Mapping[str, int] = {}
        self.batch: dict[str, Request] = {}
        self._bonds: dict[str, Bond] = {}
        self._kinds: dict[str, _Kind] = {}
        self._known: WeakValueDictionary[tuple[GapKind, str, bool], _Kind] = WeakValueDictionary()
        self._free = self._kind(FREE)
        self._counted: dict[Request, _Kind] = {}
        self._present: set[Request] = set()
        self._names: set[str] = set()
        self._inside: dict[GapKind, int] = {}
        self._tenants: dict[str, int] = {}
        self._batch: set[Request] = set()
        self._bound_anew = False
        self._running: list[Request] = []
        self._partial: list[Request] = []
        self._decodes = 0
        self._decoding: dict[GapKind, int] = {}
        self._batch_last: list[Request] = []

    def bind(self, request_id: str, bond: Bond) -> None:
        """Note what a request is bound to, for as long as it is there."""
        self._bound_anew |= request_id in self._names  # one of several turns
        self._bonds[request_id] = bond
        self._kinds[request_id] = self._kind(bond)

    def ended(self, request_id: str) -> None:
        """Forget a request."""
        self._bonds.pop(request_id, None)
        self._kinds.pop(request_id, None)

    def bond(self, request: Request) -> Bond:
        """Return what a request is bound to."""
        return self._bonds.get(request.request_id, FREE)

    def look(self, running: list[Request], partial: list[Request]) -> None:
        """Note who runs, and who of them is still reading; mostly they are as a step before."""
        if running == self._running and partial == self._partial and not self._bound_anew:
            return
        self._running, self._partial = list(running), partial
        self._recount(running)
        # New ones: those of earlier steps are still looked at.
        decoding, self.tenants = dict(self._inside), dict(self._tenants)
        for request in partial:
            _less(decoding, self._kinds.get(request.request_id, self._free).gap)
        self._decodes, self._decoding = len(running) - len(partial), decoding
        self.tbt_slos_s = tuple({own_s for _, own_s in decoding})

    def _recount(self, running: list[Request]) -> None:
        """Count those that have come since the last look, and no more those that have gone."""
        # One pass over all; what follows is of these few.
        changed = self._present.symmetric_difference(running)
        gone = changed & self._present
        come = changed - gone
        if self._bound_anew:
            come, gone, self._bound_anew, self._batch_last = set(running), set(self._present), False, []
        self._present ^= changed
        inside, tenants = self._inside, self._tenants
        for request in gone:
            kind = self._counted.pop(request)
            self._names.discard(request.request_id)
            _less(inside, kind.gap)
            _less(tenants, kind.tenant)
            if kind.batch:
                self._batch.discard(request)
                self.batch.pop(request.request_id, None)
        for request in come:
            kind = self._counted[request] = self._kinds.get(request.request_id, self._free)
            inside[kind.gap] = inside.get(kind.gap, 0) + 1
            tenants[kind.tenant] = tenants.get(kind.tenant, 0) + 1
            self._names.add(request.request_id)
            if kind.batch:
                self._batch.add(request)
                self.batch[request.request_id] = request

    def gaps(
        self, decodes: int, names: Callable[[], Iterable[str]], tbt_slo_s: float | None, pipeline: Pipeline
    ) -> Gaps:
        """Return the gaps that a step ends.

        Args:
            decodes: how many decodes are in the step.
            names: returns whose; asked only where they are not all that generate.
            tbt_slo_s: the server's own time between tokens, seconds; None for none.
            pipeline: the stages of the device.
        """
        if decodes != self._decodes:
            return self.gaps_of(names(), tbt_slo_s, pipeline)
        return Gaps(self._decoding, tbt_slo_s, pipeline)

    def gaps_of(self, names: Iterable[str], tbt_slo_s: float | None, pipeline: Pipeline) -> Gaps:
        """Return a gap for each of these requests; arguments as of `gaps`."""
        kinds = Counter(map(self._kinds.get, names))
        counts: Counter[GapKind] = Counter()
        for kind, count in kinds.items():
            counts[(self._free if kind is None else kind).gap] += count
        return Gaps(counts, tbt_slo_s, pipeline)

    def batch_last(self, decodes: list[Request]) -> list[Request]:
        """Return decodes with batch work at the end: the parent takes blocks from the tail."""
        if self.batch and decodes != self._batch_last:
            decodes = self._batch_last = sorted(decodes, key=self._batch.__contains__)
        return decodes

    def _kind(self, bond: Bond) -> _Kind:
        name = DEFAULT_CLASS if bond.slo_class is None else bond.slo_class.name
        key = (name, bond.tbt_slo_s), bond.tenant, bond.batch
        return self._known.setdefault(key, _Kind(*key))


def _less(counts: dict[Any, int], key: object) -> None:
    """Count one less; what is not there at all has no entry."""
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
