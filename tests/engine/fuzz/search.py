"""Looks for lives that break something, and cuts what it finds down to the few events that matter."""

import random
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.engine.fuzz.events import Event, random_events
from tests.engine.fuzz.life import Life
from tests.engine.fuzz.setups import Setup, random_setup

EVENTS = 60
"""What happens in a life, at the most."""

CUT = "is cut at"
"""What the kind of a cut image says."""

MOST_REPLAYS = 150
"""Replays that are spent on cutting one finding down."""


@dataclass(frozen=True)
class Finding:
    """A life that breaks something.

    Attributes:
        kind: what is raised and where: two findings of a kind are one fault.
        seed: the number of the life.
        setup: its features.
        events: what happens.
        error: the traceback.
    """

    kind: str
    seed: int
    setup: Setup
    events: tuple[Event, ...]
    error: str

    def __str__(self) -> str:
        lines = [self.kind, f"seed {self.seed}", f"Life({self.setup!r}).play(["]
        lines += [f"    {event!r}," for event in self.events]
        return "\n".join([*lines, "])", self.error])


@dataclass
class Search:
    """What a search has seen.

    Attributes:
        steps: steps that were taken.
        findings: the first finding of each kind.
        counts: how often each kind was found.
        upstream: how often stock vLLM broke in the same life, by its kind.
    """

    steps: int = 0
    lives: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)


def life_of(seed: int, policy: str | None = None) -> tuple[Setup, list[Event]]:
    """Return the features of a life by its number, and what happens in it; with a policy that is named, or any."""
    rng = random.Random(seed)
    setup = random_setup(rng, policy)
    return setup, random_events(rng, setup, rng.randrange(10, EVENTS))


def is_upstream(setup: Setup, kind: str) -> bool:
    """True for what stock vLLM is known to break in, if not in the very same life.

    Before 0.33 vLLM counts the adapters of those that a step serves: beside batches in flight, those that have nothing
    to do in a step do not count, another adapter is let in, and the next step holds both. A streamed prompt whose
    drafts were right may have nothing left to compute when its next part has come. One that is preempted with its last
    token in flight is queued for its next part, and then taken out of the queue with the others that have stopped.
    """
    adapters = setup.mode == "pipeline" and "scheduled_loras" in kind
    nothing_left = setup.streams and setup.drafts > 0 and "num_new_tokens > #" in kind
    lost = setup.streams and setup.in_flight > 1 and "a request is lost" in kind
    return adapters or nothing_left or lost


def broken(setup: Setup, events: Sequence[Event]) -> tuple[str, str, int]:
    """Play a life; return the kind of what it raises, its traceback, and the steps; empty strings for nothing."""
    life = Life(setup)
    try:
        life.play(events)
    except Exception as error:
        return kind_of(error), traceback.format_exc(limit=-6), life.steps
    return "", "", life.steps


def kind_of(error: Exception) -> str:
    """Return what is raised and by which line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).splitlines()[0][:60] if str(error) else frame.line or ""
    said = "".join("#" if c.isdigit() else c for c in text)
    return f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.name}: {said}"


def shrink(kind: str, setup: Setup, events: Sequence[Event], most_replays: int = MOST_REPLAYS) -> list[Event]:
    """Return as few of the events as break the same, found by leaving out runs of them (Zeller's delta debugging)."""
    left, size, replays = list(events), max(1, len(events) // 2), 0
    while size and replays < most_replays:
        at, cut = 0, False
        while at < len(left) and replays < most_replays:
            fewer = left[:at] + left[at + size :]
            replays += 1
            if broken(setup, fewer)[0] == kind:
                left, cut = fewer, True
            else:
                at += size
        size = size if cut and size == 1 else size // 2
    return left


def search(
    steps: int,
    first_seed: int = 0,
    policy: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Search:
    """Live for a number of steps; keep the first finding of each kind, cut down.

    A life that breaks stock vLLM in the same way is upstream's fault and is only counted; but a cut image, which ours
    must not have.
    """
    result, seed = Search(), first_seed
    while result.steps < steps:
        setup, events = life_of(seed, policy)
        kind, error, taken = broken(setup, events)
        result.steps += taken
        result.lives += 1
        if kind:
            _note(result, kind, error, seed, setup, events, tell)
        seed += 1
    return result


def _note(
    result: Search,
    kind: str,
    error: str,
    seed: int,
    setup: Setup,
    events: list[Event],
    tell: Callable[[str], None],
) -> None:
    result.counts[kind] += 1
    if is_upstream(setup, kind):
        result.upstream[kind] += 1
        return
    stock_kind = broken(setup.stock, events)[0] if setup != setup.stock else ""
    if stock_kind:
        result.upstream[stock_kind] += 1
        if stock_kind == kind and CUT not in kind:  # stock cuts images where little is left; ours must not
            return
    if kind not in result.findings:
        few = shrink(kind, setup, events)
        result.findings[kind] = Finding(kind, seed, setup, tuple(few), error)
        tell(str(result.findings[kind]))
