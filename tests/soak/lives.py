"""A scheduler's soak: the lives of the fuzz, thousands of requests long, with the wall clock jumping.

Beside what must hold in each step and at the end of a life (`tests.engine.fuzz.life`): nothing of a request that has
ended is kept, however many there were, and the process does not grow.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from tests.engine.fuzz.events import Event, WallLeap, random_events
from tests.engine.fuzz.life import Life
from tests.engine.fuzz.search import is_upstream, kind_of
from tests.engine.fuzz.setups import POLICIES, random_setup

EVENTS = 400
"""What happens in a life, at the most."""

EVENTS_PER_LEAP = 60
LEAPS_S = (-86_400.0, -3.0, 3.0, 86_400.0)
"""So often the wall clock is set, by so much."""

MOST_NAMES_KEPT = 128
"""Names of requests that have ended, which our books may still hold: some forget in lots of 64."""

MOST_GROWTH_MIB = 64.0
"""By how much the process may grow between a fifth of the way and the end."""

REQUEST_NAME = re.compile(r"r\d+")


@dataclass
class Soaked:
    """What a soak came to.

    Attributes:
        requests, steps, lives: how many there were.
        broken: what went wrong, with the seed of the life.
        upstream: lives that ended in what stock vLLM is known to break in.
        growth_mib: by how much the process has grown since a fifth of the way.
    """

    requests: int = 0
    steps: int = 0
    lives: int = 0
    broken: tuple[str, ...] = ()
    upstream: int = 0
    growth_mib: float = 0.0


def soak(requests: int, first_seed: int = 0, events: int = EVENTS) -> Soaked:
    """Live, one policy after the other, until that number of requests has come."""
    soaked, early_mib = Soaked(), 0.0
    while soaked.requests < requests:
        seed = first_seed + soaked.lives
        policy = [*POLICIES][seed % len(POLICIES)]
        rng = random.Random(seed)
        life = Life(random_setup(rng, policy))
        try:
            life.play(with_leaps(rng, random_events(rng, life.setup, events)))
            check_books(life)
        except Exception as error:
            kind = kind_of(error)
            if is_upstream(life.setup, kind):
                soaked.upstream += 1
            else:
                soaked.broken += (f"seed {seed}, {life.setup}: {kind}",)
        soaked.requests += len(life.added)
        soaked.steps += life.steps
        soaked.lives += 1
        if not early_mib and soaked.requests >= requests / 5:
            early_mib = resident_mib()
    soaked.growth_mib = resident_mib() - early_mib
    return soaked


def with_leaps(rng: random.Random, events: Iterable[Event]) -> Iterator[Event]:
    """Yield events, and set the wall clock between them."""
    for count, event in enumerate(events):
        if count % EVENTS_PER_LEAP == EVENTS_PER_LEAP - 1:
            yield WallLeap(rng.choice(LEAPS_S))
        yield event


def check_books(life: Life) -> None:
    """Check that our books hold nothing of those that have ended."""
    ours = [life.scheduler.views, life.scheduler.controller, getattr(life.scheduler, "_last_served", None)]
    names = {text for text in strings_in(ours) if REQUEST_NAME.fullmatch(text)}
    assert len(names) <= MOST_NAMES_KEPT, f"{len(names)} of {len(life.added)} requests are kept"


def strings_in(root: object) -> Iterator[str]:
    """Yield the strings in our objects and in the containers they hold; vLLM's objects are not looked into."""
    seen: set[int] = set()
    left: list[object] = [root]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | AbstractSet) or type(value).__name__ == "deque":
            left += list(value)  # type: ignore[call-overload]
        elif type(value).__module__.startswith("vllm_sarathi."):
            left += attributes(value)


def attributes(value: object) -> list[Any]:
    """Return what an object holds, in its dictionary or its slots."""
    held = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if is_dataclass(value) or hasattr(type(value), "__slots__"):
        slots = [name for name in getattr(type(value), "__slots__", ()) if name != "__weakref__"]
        held += [getattr(value, name, None) for name in slots]
    return held


def resident_mib(pid: int | str = "self") -> float:
    """Return the memory that a process holds, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
