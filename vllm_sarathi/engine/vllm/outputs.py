"""What the engine core tells an API server of its requests, before vLLM counts any of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm_sarathi.engine.vllm.internals import (
    completion_output_class,
    output_processor_class,
    request_output_class,
)

ErrorOf = Callable[[Any], Exception | None]


def divert_outputs(error_of: ErrorOf) -> None:
    """Have requests end with an error in place of some outputs of the engine core; calling it again does nothing.

    The error goes where vLLM's own go: to whoever waits for the request. vLLM ends what else belongs to the request
    (others of `n`), and counts nothing of it: no answer, no time to first token.

    Args:
        error_of: returns what a request ends with instead of an output that has a `stop_reason`; None for most.
    """
    processor = output_processor_class()
    process = processor.process_outputs
    if getattr(process, "diverts", False):
        return

    @functools.wraps(process)
    def wrapper(self: Any, engine_core_outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        kept = [output for output in engine_core_outputs if not _diverted(self, output, error_of)]
        return process(self, kept, *args, **kwargs)

    wrapper.diverts = True  # type: ignore[attr-defined]
    processor.process_outputs = wrapper


def aborted_output() -> Any:
    """Return the answer to a request that was ended before it had any."""
    completion = completion_output_class()(
        index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None, finish_reason="abort"
    )
    return request_output_class()(
        request_id="",
        prompt=None,
        prompt_token_ids=[],
        prompt_logprobs=None,
        outputs=[completion],
        finished=True,
    )


def _diverted(processor: Any, output: Any, error_of: ErrorOf) -> bool:
    """Tell whether an output is not to be seen, as its request ends with an error."""
    if output.stop_reason is None or (error := error_of(output)) is None:
        return False
    state = processor.request_states.get(output.request_id)
    if state is None or state.queue is None:
        return False
    state.queue.put(error)
    return True
