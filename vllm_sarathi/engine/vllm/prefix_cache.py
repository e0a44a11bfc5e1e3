"""How much of a waiting request vLLM would find in its prefix cache, looked up without leaving a trace."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sarathi.engine.vllm.internals import full_attention_spec_class
from vllm_sarathi.engine.vllm.protocols import Request


def cached_tokens(scheduler: Any, request: Request) -> int:
    """Return how many leading tokens of a waiting request need not be computed, as vLLM would count them now.

    What a KV connector may bring from elsewhere is not counted before it has come: asking it is not free of effects.
    The cost grows with the tokens that are found; with sliding windows and state-space layers, with the prompt.
    """
    if (
        request.num_computed_tokens
    ):  # it holds its blocks: a remote load that has ended, a session that goes on
        return int(request.num_computed_tokens)
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching or request.skip_reading_prefix_cache:
        return 0
    # One token less than there are: vLLM computes at least the last.
    hit = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[1]
    replayed = getattr(scheduler, "prefix_replay_tokens", 0)
    return max(0, int(hit) - replayed)


def shared_tokens(scheduler: Any, request: Request, others: Iterable[Request]) -> int:
    """Return how many leading tokens of a waiting request one of `others` reads before it, and leaves in the cache."""
    hashes = request.block_hashes
    if not hashes or not scheduler.kv_cache_manager.enable_caching or request.skip_reading_prefix_cache:
        return 0
    blocks = 0
    for other in others:
        theirs = other.block_hashes
        most = min(len(hashes), len(theirs))
        while blocks < most and theirs[blocks] == hashes[blocks]:  # each is of all tokens up to its end
            blocks += 1
    block_tokens = int(getattr(scheduler, "hash_block_size", scheduler.block_size))
    return min(blocks, (int(request.num_tokens) - 1) // block_tokens) * block_tokens


def reader_of(scheduler: Any, request: Request, cached: int, partial: Sequence[Request]) -> int | None:
    """Return which half-read prompt is about to leave in the cache what a waiting request lacks; None without one.

    It has read all that is cached of the request, and its next block is the request's, too. The one that has read most
    counts. One look each: a block's hash is of all tokens up to its end.

    Args:
        scheduler: vLLM's.
        request: it waits.
        cached: its tokens that are in the cache.
        partial: the prompts that are half read.
    """
    if not scheduler.kv_cache_manager.enable_caching or request.skip_reading_prefix_cache:
        return None
    block_tokens = int(getattr(scheduler, "hash_block_size", scheduler.block_size))
    usable = request.block_hashes[: (int(request.num_tokens) - 1) // block_tokens]
    best, most = None, cached - 1
    for index, reader in enumerate(partial):
        read = int(reader.num_computed_tokens)
        block, theirs = read // block_tokens, reader.block_hashes
        if read > most and block < min(len(usable), len(theirs)) and usable[block] == theirs[block]:
            best, most = index, read
    return best


@dataclass(slots=True)
class _Entry:
    """What was found for a request, and how many tokens it had then."""

    tokens: int
    of_tokens: int


class CachedPrefixes:
    """Remembers what `cached_tokens` found, and looks again where that may have changed.

    Blocks are hashed in a chain, and vLLM evicts from the tail: with full attention alone, a find of n blocks stands
    while the block n - 1 is cached and the block n is not. That is looked at, not the whole prompt. With other layers
    the whole prompt is looked up again.

    Args:
        scheduler: vLLM's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        manager = scheduler.kv_cache_manager
        self._pool = manager.block_pool
        self._caching = bool(manager.enable_caching)
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._chained = self._caching and len(groups) == 1 and _is_full_attention(groups[0].kv_cache_spec)
        self._block_tokens = int(manager.coordinator.single_type_managers[0].block_size)
        # For a drafting head, vLLM computes the last block that it has found again.
        self._dropped_blocks = int(bool(getattr(manager.coordinator, "eagle_group_ids", ())))
        self._entries: dict[str, _Entry] = {}
        self._turn = 0

    def tokens(self, request: Request) -> int:
        """Return how many leading tokens are cached, as far as is known; a request that is new is looked up."""
        if not self._caching:
            return int(request.num_computed_tokens)
        entry = self._entries.get(request.request_id)
        if request.num_computed_tokens or entry is None or entry.of_tokens != request.num_tokens:
            return self._look(request)
        return entry.tokens

    def refresh(self, requests: Sequence[Request], most_lookups: int = 32) -> None:
        """Look again at some of the requests, in turn.

        Args:
            requests: those that wait and are of interest.
            most_lookups: blocks that may be looked for, so that the cost is bounded; one request is looked at in any
                case.
        """
        if not self._caching or not requests:
            return
        if len(self._entries) > 2 * len(self._scheduler.requests) + 64:
            known = self._scheduler.requests
            self._entries = {name: entry for name, entry in self._entries.items() if name in known}
        for _ in range(len(requests)):
            request = requests[self._turn % len(requests)]
            self._turn += 1
            most_lookups -= 2
            if not self._stands(request):
                found = self._look(request)
                most_lookups -= found // self._block_tokens if self._chained else len(request.block_hashes)
            if most_lookups <= 0:
                break

    def _look(self, request: Request) -> int:
        found = cached_tokens(self._scheduler, request)
        self._entries[request.request_id] = _Entry(found, request.num_tokens)
        return found

    def _stands(self, request: Request) -> bool:
        """True where what is known of a request needs no second look."""
        entry = self._entries.get(request.request_id)
        if entry is None or not self._chained or entry.of_tokens != request.num_tokens:
            return False
        hashes = request.block_hashes
        if request.skip_reading_prefix_cache or not hashes:
            return True
        edge = entry.tokens // self._block_tokens
        if edge:
            edge += self._dropped_blocks
            if edge > len(hashes) or not self._is_cached(hashes[edge - 1]):
                return False
        last = (request.num_tokens - 1) // self._block_tokens
        return edge >= min(last, len(hashes)) or not self._is_cached(hashes[edge])

    def _is_cached(self, block_hash: Any) -> bool:
        return self._pool.get_cached_block(block_hash, [0]) is not None


def _is_full_attention(spec: Any) -> bool:
    return isinstance(spec, full_attention_spec_class()) and not getattr(spec, "sliding_window", None)
