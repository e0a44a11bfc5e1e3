"""Running batch work gives its room back if a request that goes before it waits for a slot or for KV blocks.

It is preempted as vLLM preempts when blocks run out: its answer so far is kept, and prefilled again when it comes back.
It comes back when there is room beside what the SLOs have needed lately (`limits.backfill`), so that no request is
preempted twice for the same peak. Batch work that was admitted because its class had waited for its bound stays until
its answer ends.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Wanting(Generic[Item]):
    """A request that waits for room.

    Attributes:
        request: the engine's own.
        due_s: when its first token is due, seconds; infinite without an SLO.
        arrival_s: when it arrived, seconds.
        blocks: KV blocks that it needs, beside a slot.
        tokens: left to prefill.
    """

    request: Item
    due_s: float
    arrival_s: float
    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Holding(Generic[Item]):
    """A request of batch work that runs, and the KV blocks that come free with it."""

    request: Item
    blocks: int


def giving_way(
    wanting: Iterable[Wanting[Item]],
    holding: Sequence[Holding[Item]],
    free_slots: int,
    free_blocks: int,
    most_tokens: int,
) -> tuple[list[Item], list[Item]]:
    """Return for whom room is made, and the batch work to preempt: as little as lets those run.

    Args:
        wanting: those who wait for room.
        holding: the batch work that may be preempted, the first to go first.
        free_slots: how many more requests may run.
        free_blocks: KV blocks that nobody holds; negative where fewer are left than the decodes may need.
        most_tokens: of a step; room is made for no more than one could prefill.
    """
    served: list[Item] = []
    given_up: list[Item] = []
    left = list(holding)
    for each in sorted(wanting, key=lambda each: (each.due_s, each.arrival_s)):
        taken = 0
        while (free_slots < 1 or free_blocks < each.blocks) and taken < len(left):
            free_slots, free_blocks, taken = free_slots + 1, free_blocks + left[taken].blocks, taken + 1
        if most_tokens <= 0 or free_slots < 1 or free_blocks < each.blocks:
            break
        served.append(each.request)
        given_up += [one.request for one in left[:taken]]
        del left[:taken]
        free_slots, free_blocks = free_slots - 1, free_blocks - each.blocks
        most_tokens -= each.tokens
    return served, given_up
