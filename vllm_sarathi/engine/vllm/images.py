"""What an encoder computes for the images or sound in a prompt."""

from typing import Any

from vllm_sarathi.engine.vllm.protocols import Request, SchedulerOutput


def encoder_inputs(scheduler: Any, request: Request, done_tokens: int) -> tuple[tuple[int, int], ...]:
    """Return a request's items that are to be encoded beyond its done tokens, as (start in the prompt, embeddings)."""
    encoded = getattr(scheduler.encoder_cache_manager, "cached", ())
    return tuple(
        (feature.mm_position.offset, request.get_num_encoder_embeds(index))
        for index, feature in enumerate(request.mm_features)
        if feature.mm_position.offset + feature.mm_position.length > done_tokens
        and feature.identifier not in encoded
    )


def encoder_tokens(scheduler: Any, output: SchedulerOutput) -> int:
    """Return the embeddings that an encoder computes in a step."""
    if not output.scheduled_encoder_inputs:
        return 0
    return sum(
        scheduler.requests[name].get_num_encoder_embeds(index)
        for name, items in output.scheduled_encoder_inputs.items()
        for index in items
    )
