"""What happens to an engine in a life: plain values, so that a life can be replayed, cut short and written down.

An index means one of those that are there when it happens, counted round: whatever is left out, the rest makes sense.
"""

import random
from dataclasses import dataclass

from tests.engine.fuzz.setups import IMAGE_TOKENS, MAX_MODEL_LEN, Setup


@dataclass(frozen=True)
class Add:
    """A request comes.

    Attributes:
        prompt: tokens.
        answer: tokens at most.
        seed: two of the same have the same tokens.
        copies: how many come at once, as `n` > 1 makes them.
        adapter: 0 for none.
        images: where images begin.
        grammar: it waits for a grammar.
        stream: its prompt comes in parts.
        remote: tokens that the connector has; `how` says how they come.
        slo_ms: what the client asks for; None for nothing.
    """

    prompt: int
    answer: int
    seed: int = 0
    copies: int = 1
    priority: int = 0
    adapter: int = 0
    images: tuple[int, ...] = ()
    grammar: bool = False
    stream: bool = False
    remote: int = 0
    how: str = ""
    logprobs: bool = False
    slo_ms: float | None = None


@dataclass(frozen=True)
class Steps:
    """A number of steps, each `seconds` long and more by its tokens."""

    count: int
    seconds: float = 0.01


@dataclass(frozen=True)
class Abort:
    """A client goes; `inside`: while a batch is computed."""

    index: int
    inside: bool = False


@dataclass(frozen=True)
class Pause:
    """The engine is paused or goes on: a name of vLLM's PauseState."""

    state: str


@dataclass(frozen=True)
class Reset:
    """The prefix cache is reset; `running`: those that run are preempted for it."""

    running: bool


@dataclass(frozen=True)
class Duplicate:
    """A request comes under the id of another."""

    index: int


@dataclass(frozen=True)
class Part:
    """The next part of a streamed prompt comes; 0 tokens end it."""

    index: int
    tokens: int


@dataclass(frozen=True)
class Grammar:
    """A grammar is compiled, or cannot be."""

    index: int
    well: bool = True


@dataclass(frozen=True)
class Load:
    """A load of the connector's ends, well or not."""

    index: int
    well: bool = True


@dataclass(frozen=True)
class Sent:
    """A send of the connector's ends."""


@dataclass(frozen=True)
class Leap:
    """The clock goes on by itself."""

    seconds: float


@dataclass(frozen=True)
class WallLeap:
    """The wall clock is set, by so much."""

    seconds: float


Event = Add | Steps | Abort | Pause | Reset | Duplicate | Part | Grammar | Load | Sent | Leap | WallLeap


def random_events(rng: random.Random, setup: Setup, count: int) -> list[Event]:
    """Return what happens in a life with a setup."""
    return [_random_event(rng, setup) for _ in range(count)]


def _random_event(rng: random.Random, setup: Setup) -> Event:
    kinds: list[tuple[float, str]] = [(30, "add"), (40, "steps"), (4, "abort"), (2, "pause"), (2, "unpause")]
    kinds += [(1.5, "reset"), (1, "duplicate"), (3, "grammar"), (0.5, "leap")]
    if setup.connector:
        kinds += [(12, "load"), (4, "sent")]
    if setup.streams:
        kinds += [(12, "part")]
    kind = rng.choices([name for _, name in kinds], [weight for weight, _ in kinds])[0]
    index = rng.randrange(1000)
    match kind:
        case "add":
            return _random_add(rng, setup)
        case "steps":
            return Steps(rng.randrange(1, 10), rng.choice((0.005, 0.01, 0.02)))
        case "abort":
            return Abort(index, rng.random() < 0.5)
        case "pause":
            return Pause(rng.choice(("PAUSED_NEW", "PAUSED_NEW", "PAUSED_ALL")))
        case "unpause":
            return Pause("UNPAUSED")
        case "reset":
            return Reset(rng.random() < 0.5)
        case "duplicate":
            return Duplicate(index)
        case "part":
            return Part(index, rng.choice((0, 1, 5, 30)))
        case "grammar":
            return Grammar(index, rng.random() < 0.8)
        case "load":
            return Load(index, rng.random() < 0.7)
        case "sent":
            return Sent()
        case _:
            return Leap(rng.choice((0.5, 40.0)))


def _random_add(rng: random.Random, setup: Setup) -> Add:
    prompt = rng.choice((rng.randrange(1, 20), rng.randrange(1, MAX_MODEL_LEN - 8), rng.randrange(60, 200)))
    images: tuple[int, ...] = ()
    if setup.images and prompt > IMAGE_TOKENS + 10 and rng.random() < 0.5:
        first = rng.randrange(0, prompt - IMAGE_TOKENS)
        second = first + IMAGE_TOKENS + rng.randrange(0, 20)
        images = (first, second) if second + IMAGE_TOKENS < prompt and rng.random() < 0.5 else (first,)
    stream = setup.streams and not images and rng.random() < 0.4
    return Add(
        prompt=min(prompt, 60) if stream else prompt,
        answer=rng.randrange(1, 24),
        seed=rng.randrange(6),
        copies=rng.choice((1, 1, 1, 1, 2, 5)) if not stream else 1,
        priority=rng.randrange(3) if setup.priorities else 0,
        adapter=rng.randrange(4) if setup.adapters else 0,
        images=images,
        grammar=not stream and rng.random() < 0.15,
        stream=stream,
        remote=rng.randrange(1, prompt + 1) if setup.connector and rng.random() < 0.5 else 0,
        how=rng.choice(("async", "async", "sync", "async unsure", "async send", "send")),
        logprobs=rng.random() < 0.1,
        slo_ms=rng.choice((None, None, None, 20.0, 200.0)),
    )
