"""What those that run are bound to: who comes or goes changes the counts, and every step reads them."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

from vllm_sarathi.core.classes import Bond
from vllm_sarathi.core.figures import DEFAULT_CLASS, ClassGaps
from vllm_sarathi.core.types import Pipeline
from vllm_sarathi.engine.vllm.protocols import Request

FREE = Bond()
"""What a request without an SLO of its own is bound to."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Kind:
    """What requests have in common that are counted as one. Told apart by identity: a hash of all this is slow."""

    slo_class: str
    tbt_slo_s: float | None
    tenant: str
    batch: bool


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
        self._known: WeakValueDictionary[tuple[str, float | None, str, bool], _Kind] = WeakValueDictionary()
        self._free = self._kind(FREE)
        self._counted: dict[Request, _Kind] = {}
        self._present: set[Request] = set()
        self._names: set[str] = set()
        self._inside: Counter[_Kind] = Counter()
        self._batch: set[Request] = set()
        self._bound_anew = False
        self._running: list[Request] = []
        self._partial: list[Request] = []
        self._decodes = 0
        self._decoding: dict[_Kind, int] = {}
        self._gaps: tuple[ClassGaps, ...] | None = None
        self._gaps_slo_s: float | None = None
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
        decoding = dict(self._inside)
        for request in partial:  # few, and a Counter is slow
            kind = self._kinds.get(request.request_id, self._free)
            decoding[kind] -= 1
            if not decoding[kind]:
                del decoding[kind]
        self._decodes, self._decoding, self._gaps = len(running) - len(partial), decoding, None
        self.tbt_slos_s = tuple({kind.tbt_slo_s for kind in decoding})
        tenants: dict[str, int] = {}
        for kind, count in self._inside.items():
            tenants[kind.tenant] = tenants.get(kind.tenant, 0) + count
        self.tenants = tenants

    def _recount(self, running: list[Request]) -> None:
        """Count those that have come since the last look, and no more those that have gone."""
        counted, inside = self._counted, self._inside
        # One pass over all; what follows is of these few.
        changed = self._present.symmetric_difference(running)
        gone = changed & self._present
        come = changed - gone
        if self._bound_anew:
            come, gone, self._bound_anew, self._batch_last = set(running), set(self._present), False, []
        self._present ^= changed
        for request in gone:
            kind = counted.pop(request)
            self._names.discard(request.request_id)
            inside[kind] -= 1
            if not inside[kind]:
                del inside[kind]
            if kind.batch:
                self._batch.discard(request)
                self.batch.pop(request.request_id, None)
        for request in come:
            kind = counted[request] = self._kinds.get(request.request_id, self._free)
            inside[kind] += 1
            self._names.add(request.request_id)
            if kind.batch:
                self._batch.add(request)
                self.batch[request.request_id] = request

    def gaps(
        self, decodes: int, names: Callable[[], Iterable[str]], tbt_slo_s: float | None, pipeline: Pipeline
    ) -> tuple[ClassGaps, ...]:
        """Return the gaps that a step ends, by class and by SLO.

        Args:
            decodes: how many decodes are in the step.
            names: returns whose; asked only where they are not all that generate.
            tbt_slo_s: the server's own time between tokens, seconds; None for none.
            pipeline: the stages of the device.
        """
        if decodes != self._decodes:
            return self.gaps_of(names(), tbt_slo_s, pipeline)
        if self._gaps is None or self._gaps_slo_s != tbt_slo_s:
            self._gaps, self._gaps_slo_s = _gaps(self._decoding, tbt_slo_s, pipeline), tbt_slo_s
        return self._gaps

    def gaps_of(
        self, names: Iterable[str], tbt_slo_s: float | None, pipeline: Pipeline
    ) -> tuple[ClassGaps, ...]:
        """Return a gap for each of these requests; arguments as of `gaps`."""
        return _gaps(self._count(names), tbt_slo_s, pipeline)

    def batch_last(self, decodes: list[Request]) -> list[Request]:
        """Return decodes with batch work at the end: the parent takes blocks from the tail."""
        if self.batch and decodes != self._batch_last:
            is_batch = self._batch.__contains__
            decodes = [*itertools.filterfalse(is_batch, decodes), *filter(is_batch, decodes)]
            self._batch_last = decodes
        return decodes

    def _kind(self, bond: Bond) -> _Kind:
        name = DEFAULT_CLASS if bond.slo_class is None else bond.slo_class.name
        key = name, bond.tbt_slo_s, bond.tenant, bond.batch
        return self._known.setdefault(key, _Kind(*key))

    def _count(self, names: Iterable[str]) -> Counter[_Kind]:
        found = Counter(map(self._kinds.get, names))
        counts = Counter({kind: count for kind, count in found.items() if kind is not None})
        if free := found[None]:
            counts[self._free] += free
        return counts


def _gaps(kinds: Mapping[_Kind, int], tbt_slo_s: float | None, pipeline: Pipeline) -> tuple[ClassGaps, ...]:
    counts: dict[tuple[str, float | None], int] = {}
    for kind, count in kinds.items():
        slo_s = tbt_slo_s if kind.tbt_slo_s is None else kind.tbt_slo_s
        with_slo = slo_s is not None and math.isfinite(slo_s)
        key = kind.slo_class, slo_s if with_slo else None
        counts[key] = counts.get(key, 0) + count
    return tuple(
        ClassGaps(name, count, None if slo_s is None else pipeline.step_s(slo_s))
        for (name, slo_s), count in counts.items()
    )
