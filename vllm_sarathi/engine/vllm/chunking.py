"""Where vLLM, or the model, does not let a prompt be cut: what the decision's `ChunkRules` say of one request."""

from typing import Any

from vllm_sarathi.core.chunk_rules import ANYWHERE, ChunkRules
from vllm_sarathi.engine.vllm.internals import logger
from vllm_sarathi.engine.vllm.protocols import Request


class Chunking:
    """What of an engine's configuration decides where prompts may be cut; made once per scheduler.

    Args:
        scheduler: vLLM's.
    """

    def __init__(self, scheduler: Any) -> None:
        config, limits = scheduler.vllm_config, scheduler.scheduler_config
        self._whole_items = bool(limits.disable_chunked_mm_input or config.model_config.is_mm_prefix_lm)
        # vLLM keeps some of a step's positions for what a request drafts.
        slots = getattr(config.speculative_config, "max_num_new_slots_for_drafting", 0)
        self._most_tokens = min(scheduler.max_num_scheduled_tokens, limits.max_num_batched_tokens - slots)
        # It may leave this aside, as where a request is alone; what is above it could wait for that for ever.
        if limits.long_prefill_token_threshold:
            self._most_tokens = min(self._most_tokens, limits.long_prefill_token_threshold)
        self._has_told = False
        self._drafts = int(scheduler.num_spec_tokens)
        # A chunk of a state-space model ends where its state is cached: vLLM rounds down to such a place, also to 0.
        aligned = scheduler.need_mamba_block_aligned_split
        multiple = int(config.cache_config.block_size) if aligned else 1
        if multiple > self._most_tokens:  # or anywhere, where no chunk can be so long
            multiple = 1
        # Several prediction modules draft from the next known tokens: vLLM leaves them that number, or none.
        tail = int(scheduler.num_prefill_lookahead)
        self._plain = ANYWHERE if multiple == 1 and tail <= 1 else ChunkRules((), multiple, tail)

    def rules(self, request: Request, start: int) -> ChunkRules:
        """Return where the chunks of a request from `start` on may end.

        An item that `start` is inside of is whole from there on: what is cut already cannot be mended. Where vLLM takes
        no chunk in a step that is long enough for what comes next, that is cut, as by vLLM itself.
        """
        if not self._whole_items or not request.mm_features:
            return self._plain
        positions = [feature.mm_position for feature in request.mm_features]
        spans = sorted((p.offset, p.offset + p.length) for p in positions)
        whole: list[tuple[int, int]] = []
        for first, last in spans:
            if whole and first < whole[-1][1]:  # items that overlap are one
                whole[-1] = (whole[-1][0], max(last, whole[-1][1]))
            elif last > start:
                whole.append((max(first, start), last))
        rules = ChunkRules(tuple(whole), self._plain.multiple, self._plain.tail_tokens)
        if not whole or (least := rules.least(start, request.num_tokens)) <= self._most_tokens:
            return rules
        self._tell_of_cut(least)
        return self._plain

    def beginning(self, request: Request, start: int) -> tuple[int, ChunkRules]:
        """Return what is left of a waiting request from `start` on, tokens, and where its chunks may end.

        vLLM begins a single token as a decode, together with places for its drafts, or not at all.
        """
        left = max(1, request.num_tokens - start)
        if left > 1 or not self._drafts:
            return left, self.rules(request, start)
        return 1 + self._drafts, ANYWHERE  # and not whole: a fixed budget is not exceeded for it

    def _tell_of_cut(self, tokens: int) -> None:
        """Say once that something is cut that should be whole."""
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "An image (or other item) of %d tokens is cut, as the engine takes at most %d of a prompt in one step; "
                "raise --long-prefill-token-threshold or --max-num-batched-tokens to keep such items whole.",
                tokens,
                self._most_tokens,
            )
