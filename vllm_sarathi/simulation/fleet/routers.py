"""Routers: which replica a request is sent to. A new one is a class and a line in ROUTERS."""

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.fleet.replica import Answer
from vllm_sarathi.simulation.workloads.requests import PREFIX_TOKENS, SimulatedRequest


class Router(Protocol):
    """Chooses a replica.

    Attributes:
        looks: whether it looks at the replicas before it chooses.
        asks: whether it asks each when the prompt would have its first token.
    """

    looks: bool
    asks: bool

    def choose(self, request: SimulatedRequest, replicas: Sequence[Answer]) -> int:
        """Return which of the replicas, of which there is at least one, a request goes to, by its place."""
        ...


class RoundRobin:
    """One after the other."""

    looks = asks = False

    def __init__(self, kv_tokens: int) -> None:
        self._sent = 0

    def choose(self, request: SimulatedRequest, replicas: Sequence[Answer]) -> int:
        """Return the next one."""
        self._sent += 1
        return (self._sent - 1) % len(replicas)


class Turns:
    """Whose turn it is among equals, of whom there are others each time."""

    def __init__(self) -> None:
        self._chosen = 0
        self._last: dict[int, int] = {}

    def choose(self, replicas: Sequence[Answer], equal: Iterable[int]) -> int:
        """Return the one of some places whose replica was chosen longest ago, the first of those that never were."""
        place = min(equal, key=lambda each: self._last.get(replicas[each].replica, 0))
        self._chosen += 1
        self._last[replicas[place].replica] = self._chosen
        return place


class LeastTokens:
    """Where the fewest prompt tokens wait to be read."""

    looks, asks = True, False

    def __init__(self, kv_tokens: int) -> None:
        self._turns = Turns()

    def choose(self, request: SimulatedRequest, replicas: Sequence[Answer]) -> int:
        """Return the one with the fewest; of equals, the one that was chosen longest ago."""
        least = min(replica.waiting_tokens for replica in replicas)
        equal = (place for place, replica in enumerate(replicas) if replica.waiting_tokens == least)
        return self._turns.choose(replicas, equal)


class PrefixAffinity:
    """Where the fewest tokens are to be read until the prompt is: those that wait, and those of it that are not cached.

    It takes to be cached what it has sent to a replica itself, the last of it, as much as a KV cache holds.

    Args:
        kv_tokens: tokens in a replica's KV cache.
    """

    looks, asks = True, False

    def __init__(self, kv_tokens: int) -> None:
        self._most = max(1, kv_tokens // PREFIX_TOKENS)
        self._sent: dict[int, OrderedDict[int, None]] = {}
        self._turns = Turns()

    def choose(self, request: SimulatedRequest, replicas: Sequence[Answer]) -> int:
        """Return the one with the fewest; of equals, the one that was chosen longest ago."""
        to_prefill = [r.waiting_tokens - self._cached_tokens(r.replica, request) for r in replicas]
        least = min(to_prefill)
        place = self._turns.choose(replicas, (i for i, tokens in enumerate(to_prefill) if tokens == least))
        sent = self._sent.setdefault(replicas[place].replica, OrderedDict())
        for piece in request.prefix:
            sent[piece] = None
            sent.move_to_end(piece)
        while len(sent) > self._most:
            sent.popitem(last=False)
        return place

    def _cached_tokens(self, replica: int, request: SimulatedRequest) -> int:
        sent: Container[int] = self._sent.get(replica, ())
        pieces = 0
        for piece in request.prefix:
            if piece not in sent:
                break
            pieces += 1
        return min(pieces * PREFIX_TOKENS, request.prompt_tokens - 1)


class FirstToken:
    """Where the prompt would have its first token soonest, by the replicas' own answers, and its SLO is met.

    A replica that has no answer yet, as it has not learnt how fast it is, gets a prompt when nothing waits there.
    """

    looks = asks = True

    def __init__(self, kv_tokens: int) -> None:
        self._turns = LeastTokens(kv_tokens)

    def choose(self, request: SimulatedRequest, replicas: Sequence[Answer]) -> int:
        """Return the soonest of those that meet the SLO; of all, where none does."""
        ranks = [self._rank(replica) for replica in replicas]
        best = min(ranks)
        equal = [place for place, rank in enumerate(ranks) if rank == best]
        return equal[self._turns.choose(request, [replicas[place] for place in equal])]

    @staticmethod
    def _rank(replica: Answer) -> tuple[bool, float]:
        if replica.wait_s is None:
            return False, 0.0 if not replica.waiting_tokens else math.inf
        return replica.kept is False, replica.wait_s


ROUTERS: dict[str, type[RoundRobin] | type[LeastTokens] | type[PrefixAffinity] | type[FirstToken]] = {
    "round-robin": RoundRobin,
    "least-tokens": LeastTokens,
    "prefix-affinity": PrefixAffinity,
    "first-token": FirstToken,
}


def router(name: str, kv_tokens: int) -> Router:
    """Return a router by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ROUTERS:
        raise ConfigError(f"--router {name!r}: unknown; {nearest_hint(name, ROUTERS)}")
    made: Router = ROUTERS[name](kv_tokens)
    return made
