"""What those that run are bound to, counted when somebody comes or goes: always as if it were counted anew."""

import functools
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.figures import ClassGaps
from vllm_sarathi.core.types import Pipeline
from vllm_sarathi.engine.company import Company

PIPELINE = Pipeline(2)

CLASSES = (
    SloClass("fast", ttft_slo_ms=100, tbt_slo_ms=50),
    SloClass("slow", tbt_slo_ms=100),
    SloClass("night", batch=True),
)


@dataclass(eq=False)
class Runner:
    request_id: str
    is_prefill_chunk: bool = True


def bond_of(chance: random.Random) -> Bond:
    slo_class = chance.choice(CLASSES)
    own_s = math.inf if slo_class.batch else chance.choice((slo_class.tbt_slo_s, 0.3))
    return Bond(own_s, None, slo_class, f"tenant-{chance.randrange(3)}", chance.random())


def gaps(bonds: Iterable[Bond], server_s: float) -> set[ClassGaps]:
    counts: Counter[tuple[str, float | None]] = Counter()
    for bond in bonds:
        slo_s = server_s if bond.tbt_slo_s is None else bond.tbt_slo_s
        name = "default" if bond.slo_class is None else bond.slo_class.name
        counts[name, None if slo_s == math.inf else slo_s / 2] += 1
    return {ClassGaps(name, count, slo_s) for (name, slo_s), count in counts.items()}


def test_it_is_always_what_a_count_of_all_would_say() -> None:
    chance, company = random.Random(4), Company()
    bonds: dict[str, Bond] = {}
    running: list[Any] = []
    preempted: list[Any] = []
    asked: list[tuple[Any, list[ClassGaps]]] = []
    for step in range(600):
        event = chance.randrange(6)
        if event == 0 or not running:
            running.append(Runner(f"r{step}"))
            bonds[running[-1].request_id] = Bond()
            if chance.random() < 0.8:
                bonds[running[-1].request_id] = bond_of(chance)
                company.bind(running[-1].request_id, bonds[running[-1].request_id])
        elif event == 1:
            company.ended(running.pop(chance.randrange(len(running))).request_id)
        elif event == 2:
            chance.choice(running).is_prefill_chunk = False
        elif event == 3:  # preempted, and back later; it may come back before anybody has looked
            preempted.append(running.pop(chance.randrange(len(running))))
        elif (
            event == 4
        ):  # one with several turns is bound anew while it runs, and the order of those that run changes
            bonds[running[0].request_id] = bond_of(chance)
            company.bind(running[0].request_id, bonds[running[0].request_id])
            chance.shuffle(running)
        if preempted and chance.random() < 0.3:
            running.append(preempted.pop())
        company.look(running, [runner for runner in running if runner.is_prefill_chunk])
        decoding = [runner.request_id for runner in running if not runner.is_prefill_chunk]
        server_s = 0.3 if step % 50 < 25 else 0.5  # the server's own changes while nobody comes or goes
        found = list(company.gaps(len(decoding), lambda: (), server_s, PIPELINE))
        assert set(found) == gaps([bonds[name] for name in decoding], server_s)
        assert len(found) == len(set(found))
        part = decoding[: len(decoding) // 2]
        of_part = company.gaps(len(part), functools.partial(set, part), server_s, PIPELINE)
        assert set(of_part) == gaps([bonds[name] for name in part], server_s)
        asked.append((company.gaps(len(decoding), lambda: (), server_s, PIPELINE), found))
        assert set(company.tbt_slos_s) == {bonds[name].tbt_slo_s for name in decoding}
        assert company.tenants == Counter(bonds[runner.request_id].tenant for runner in running)
        assert company.batch == {r.request_id: r for r in running if bonds[r.request_id].batch}
        decodes = [runner for runner in running if not runner.is_prefill_chunk]
        assert company.batch_last(decodes) == sorted(decodes, key=lambda r: bonds[r.request_id].batch)
    assert all(list(later) == found for later, found in asked)  # whoever has come or gone meanwhile
    assert len({(bond.slo_class, bond.tbt_slo_s) for bond in bonds.values()}) > 4


def test_nothing_is_kept_of_those_that_have_ended() -> None:
    company = Company()
    for i in range(50):
        company.bind(f"r{i}", Bond(0.1, None, CLASSES[0], f"tenant-{i}"))
        company.ended(f"r{i}")
    company.look([], [])
    assert not company._bonds
    assert not company._kinds
    assert len(company._known) == 1  # that of who is bound to nothing
