"""Whether a waiting request can run in the next step, in the terms in which vLLM's `schedule` decides.

One predicate, asked before anybody yields a turn: `Admission(scheduler).blocker(request)`.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import islice
from typing import Any

from vllm_sarathi.engine.vllm.internals import pause_state, request_status
from vllm_sarathi.engine.vllm.limits import adapters_of, look_at_waiting, slot_limits
from vllm_sarathi.engine.vllm.protocols import Request
from vllm_sarathi.engine.vllm.queues import waiting_requests
from vllm_sarathi.engine.vllm.transfers import REMOTE_PREFILL


class Blocker(Enum):
    """What keeps a waiting request from running in the next step, whatever its place in the queue."""

    PAUSED = "the engine is paused"
    SLOT = "all slots are taken"
    GRAMMAR = "its grammar is not compiled"
    REMOTE_KV = "its KV cache is on its way from elsewhere"
    STREAMING_INPUT = "more of its input is to come"
    STALE_OUTPUT = "an output from before its preemption is under way"
    ADAPTER = "all adapter slots are taken by other adapters"
    TRANSFER = "a connector has yet to say what it brings"
    ENCODER = "the encoder cache has no room for its next item"
    BLOCKS = "too few KV-cache blocks are free"


PASSED_OVER = {
    Blocker.GRAMMAR,
    Blocker.REMOTE_KV,
    Blocker.STREAMING_INPUT,
    Blocker.STALE_OUTPUT,
    Blocker.ADAPTER,
}
"""Who is kept from running by one of these lets those behind it pass; the others end vLLM's walk of the queue."""

LOOKED_AT = 64
"""Of the queue, where it is asked whether anybody could run."""


class Admission:
    """What a step could let in; made once a step, before anything is hidden, and asked for any number of requests.

    It tells vLLM of grammars that do not compile, changes nothing else, and is on the safe side: a request without a
    blocker runs if it is at the head of the queue and the budget covers its smallest chunk.

    Args:
        scheduler: vLLM's, with all running requests in `running`.
        decodes: requests that decode in the step; each may need a block.

    Attributes:
        free_slots: how many more requests may run.
        paused: whether nobody new is let in.
    """

    def __init__(self, scheduler: Any, decodes: int = 0) -> None:
        self._scheduler = scheduler
        states = pause_state()
        self._paused_all = scheduler.pause_state == states.PAUSED_ALL
        self.paused = scheduler.pause_state != states.UNPAUSED
        # Sessions that wait for input are not in `running`, but keep their slots.
        taken = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
        slots = min(getattr(scheduler, name) for name in slot_limits(scheduler))
        self.free_slots = max(0, int(slots - taken))
        self._decodes = decodes
        self._connected = scheduler.connector is not None or scheduler.ec_connector is not None
        self._adapters: set[int] | None = None
        self._blocks_left: int | None = None

    def blocker(self, request: Request, cached_tokens: int = 0) -> Blocker | None:
        """Return what keeps a waiting request from running; None for nothing.

        Args:
            request: a waiting request.
            cached_tokens: how many of its leading tokens are in the prefix cache.
        """
        if self._paused_all or (self.paused and not request.num_computed_tokens):
            return Blocker.PAUSED
        if not self.free_slots:
            return Blocker.SLOT
        return self._by_itself(request, cached_tokens) or (
            None if self.has_blocks(request) else Blocker.BLOCKS
        )

    def waits_for_room(self, request: Request, cached_tokens: int = 0) -> bool:
        """True where a waiting request that cannot run lacks a slot or KV blocks, and nothing else."""
        return not self.paused and self._by_itself(request, cached_tokens) is None

    def _by_itself(self, request: Request, cached_tokens: int) -> Blocker | None:
        start = request.num_computed_tokens or cached_tokens
        return (
            self._by_status(request)
            or self._by_adapter(request)
            or (self._by_transfer(request) if self._connected else None)
            or (self._by_encoder(request, start) if request.mm_features else None)
        )

    def _by_status(self, request: Request) -> Blocker | None:
        status = request_status()
        if request.status is status.WAITING and not request.num_stale_output_tokens:
            return None
        if request.status == status.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            wanted = request.structured_output_request
            grammar = wanted.grammar if wanted else None
            if isinstance(
                grammar, Exception
            ):  # vLLM ends those that it sees, and looks at the queue's head only
                look_at_waiting(self._scheduler, request)
            # One that does not compile ends the request with an error, which takes no turn either.
            return Blocker.GRAMMAR if grammar is None or isinstance(grammar, Exception) else None
        if request.status == status.WAITING_FOR_REMOTE_KVS:
            arrived = request.request_id in self._scheduler.finished_recving_kv_req_ids
            return None if arrived else Blocker.REMOTE_KV
        if request.status == status.WAITING_FOR_STREAMING_REQ:
            return Blocker.STREAMING_INPUT
        if request.num_stale_output_tokens and not request.drop_stale_output:
            return Blocker.STALE_OUTPUT
        return None

    def _by_adapter(self, request: Request) -> Blocker | None:
        scheduler = self._scheduler
        if not scheduler.lora_config or not request.lora_request:
            return None
        if self._adapters is None:
            # All that run count, also those that this step leaves out: the next step runs them together.
            self._adapters = adapters_of(scheduler.running)
        full = len(self._adapters) >= scheduler.lora_config.max_loras
        return Blocker.ADAPTER if full and request.lora_request.lora_int_id not in self._adapters else None

    def _by_transfer(self, request: Request) -> Blocker | None:
        scheduler = self._scheduler
        if request.num_computed_tokens == 0 and scheduler.connector is not None:
            transfer = request.kv_transfer_params
            if transfer and transfer.get(REMOTE_PREFILL):
                return Blocker.TRANSFER
        if scheduler.ec_connector is not None and request.mm_features:
            return Blocker.TRANSFER
        return None

    def _by_encoder(self, request: Request, start: int) -> Blocker | None:
        """Tell whether the item that the next token is inside of can be encoded; those behind it end a chunk early."""
        scheduler = self._scheduler
        ahead = start + scheduler.num_prefill_lookahead
        for index, feature in enumerate(request.mm_features):
            position = feature.mm_position
            if not position.offset <= ahead or start >= position.offset + position.length:
                continue
            manager = scheduler.encoder_cache_manager
            if feature.identifier in getattr(manager, "cached", ()):
                continue
            needed = request.get_num_encoder_embeds(index)
            room = min(scheduler.max_num_encoder_input_tokens, getattr(manager, "num_freeable_slots", needed))
            if needed > room:
                return Blocker.ENCODER
        return None

    def has_blocks(self, request: Request) -> bool:
        """True where enough KV-cache blocks are free for the whole request, and for a step of the decodes.

        Its cached blocks are counted as needed, too, unless another request holds them: taking one out of the
        free blocks leaves one less.
        """
        free = self.unclaimed_blocks()
        return self._needed_blocks(request) <= free or self.wanted_blocks(request) <= free

    def wanted_blocks(self, request: Request) -> int:
        """Return how many more KV-cache blocks a waiting request takes: those that it, or one that runs, has aside."""
        manager, needed = self._scheduler.kv_cache_manager, self._needed_blocks(request)
        if request.num_computed_tokens:
            held = manager.get_block_ids(request.request_id)
            return int(needed - sum(len(group) for group in held))
        if not manager.enable_caching or request.skip_reading_prefix_cache:
            return needed
        found = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)[0]
        return int(
            needed - sum(block.ref_cnt > 0 and not block.is_null for group in found for block in group)
        )

    def free_tokens(self) -> int:
        """Return the tokens that the KV cache has room for, beside a step of the decodes."""
        manager = self._scheduler.kv_cache_manager
        free = manager.block_pool.get_num_free_blocks() - self.decode_blocks()
        managers = manager.coordinator.single_type_managers
        return max(0, int(free * managers[0].block_size // len(managers)))

    def fitting(self, requests: Sequence[Request]) -> int:
        """Return how many of the requests, one after the other, find slots and blocks together, shared ones aside."""
        free = self.unclaimed_blocks()
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        # Most often all find room, and that can be told at once; a state of a hybrid model has some blocks of its own.
        tokens = sum([request.num_tokens for request in requests])
        most = sum(tokens // single.block_size + 8 * len(requests) for single in managers)
        if most <= free and len(requests) <= self.free_slots:
            return len(requests)
        for count, request in enumerate(requests):
            free -= self._needed_blocks(request)
            if count >= self.free_slots or free < 0:
                return count
        return len(requests)

    def unclaimed_blocks(self) -> int:
        """Return the KV-cache blocks that are free beside a step of the decodes and what vLLM keeps free."""
        manager = self._scheduler.kv_cache_manager
        if self._blocks_left is None:
            self._blocks_left = manager.block_pool.get_num_free_blocks() - self.decode_blocks()
            if self._scheduler.running:
                self._blocks_left -= manager.watermark_blocks
        return self._blocks_left

    def _needed_blocks(self, request: Request) -> int:
        tokens = min(request.num_tokens, self._scheduler.max_model_len)
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(_most_blocks(single, tokens) for single in managers)

    def decode_blocks(self) -> int:
        """Return the most blocks that the decodes of a step can take."""
        scheduler = self._scheduler
        ahead = 1 + scheduler.num_spec_tokens + scheduler.num_lookahead_tokens
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        return self._decodes * int(sum(1 + ahead // single.block_size for single in managers))


def _most_blocks(manager: Any, tokens: int) -> int:
    """Return the most blocks that vLLM takes for a number of tokens in the layers of one kind."""
    if getattr(manager, "mamba_cache_mode", None) == "align":
        # The running state, the one that is being written, a checkpoint, and those of drafts.
        return 3 + int(manager.num_speculative_blocks)
    blocks = -(-tokens // manager.block_size)
    # Sliding windows give back what has left the window. vLLM 0.30 has no public name for it: then all is counted.
    cap = getattr(manager, "max_admission_blocks_per_request", None)
    return int(blocks if cap is None else min(blocks, cap))


def has_runnable_prefill(scheduler: Any) -> bool:
    """True where nothing but the token budget keeps a prompt from being read: it is not blocked or paused."""
    if scheduler.pause_state == pause_state().PAUSED_ALL:
        return False
    if any(request.is_prefill_chunk for request in scheduler.running):
        return True
    admission = Admission(scheduler)
    for request in islice(waiting_requests(scheduler), LOOKED_AT):
        blocker = admission.blocker(request)
        if blocker not in PASSED_OVER:
            return blocker is None
    return False


def can_hide(scheduler: Any, decodes: int, first: Request | None) -> bool:
    """True where a step can do without preempting: a hidden request's KV blocks are out of the parent's reach.

    Args:
        scheduler: vLLM's.
        decodes: requests that decode in the step.
        first: the request that is to be read first; None for none.
    """
    step = Admission(scheduler, 2 * decodes)
    if first is None:
        return bool(scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > step.decode_blocks() + 2)
    return step.has_blocks(first)


def has_slot(scheduler: Any) -> bool:
    """True where one more request may run."""
    return Admission(scheduler).free_slots > 0
