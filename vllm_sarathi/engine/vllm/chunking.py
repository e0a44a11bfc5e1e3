"""Where vLLM, or the model, does not let a prompt be cut: what the decision's `ChunkRules` say of one request."""

from typing import Any

from vllm_sarathi.core.chunk_rules import ANYWHERE, ChunkRules
from vllm_sarathi.engine.vllm.protocols import Request


class Chunking:
    """What of an engine's configuration decides where prompts may be cut; made once per scheduler.

    Args:
        scheduler: vLLM's.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.vllm_config
        self._whole_items = bool(
            scheduler.scheduler_config.disable_chunked_mm_input or config.model_config.is_mm_prefix_lm
        )
        # A chunk of a state-space model ends where its state is cached: vLLM rounds down to such a place, also to 0.
        aligned = scheduler.need_mamba_block_aligned_split
        multiple = int(config.cache_config.block_size) if aligned else 1
        # Several prediction modules draft from the next known tokens: vLLM leaves them that number, or none.
        tail = int(scheduler.num_prefill_lookahead)
        self._plain = ANYWHERE if multiple == 1 and tail <= 1 else ChunkRules((), multiple, tail)

    def rules(self, request: Request, start: int) -> ChunkRules:
        """Return where the chunks of a request from `start` on may end.

        An item that `start` is inside of is whole from there on: what is cut already cannot be mended.
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
        return ChunkRules(tuple(whole), self._plain.multiple, self._plain.tail_tokens)
