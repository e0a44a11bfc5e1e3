"""A KV connector without a device: prompts whose KV cache another engine has computed and sends over a link.

vLLM's scheduler asks it what it asks of any connector. A request says `do_remote_prefill` in its `kv_transfer_params`,
as vLLM's proxies for disaggregated prefill send it: blocks are allocated, and it waits for its KV outside of the step.
"""

import functools
from collections.abc import Iterable
from typing import Any

from vllm_sarathi.engine.vllm.internals import kv_connector_class, kv_connector_output_class
from vllm_sarathi.engine.vllm.protocols import Request

REMOTE_PREFILL = "do_remote_prefill"


def remote_prefill() -> dict[str, Any]:
    """Return what a request says whose prompt has been read elsewhere."""
    return {"kv_transfer_params": {REMOTE_PREFILL: True}}


def arrived(names: Iterable[str]) -> Any:
    """Return what a step's output says of requests whose KV has come."""
    return kv_connector_output_class()(finished_recving=set(names))


class Transfers:
    """The scheduler's side of a connector that only receives; `transfers` makes one that is vLLM's, too.

    Attributes:
        loading: the requests that have blocks and whose KV is not there yet.
    """

    def __init__(self) -> None:
        # The parent's wants a configuration of workers, which there are none of.
        self.loading: dict[str, None] = {}

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens beyond those in the local cache come from elsewhere, and that they come later."""
        wanted = request.kv_transfer_params
        count = request.num_prompt_tokens - num_computed_tokens
        return (count, True) if wanted and wanted.get(REMOTE_PREFILL) and count > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Begin to load; one that is preempted later is read anew here, as its sender has forgotten it."""
        wanted = request.kv_transfer_params
        if wanted and num_external_tokens > 0:
            self.loading[request.request_id] = None
            wanted[REMOTE_PREFILL] = False

    def take(self, names: Iterable[str]) -> None:
        """Note that the KV of these has come."""
        for name in names:
            del self.loading[name]

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Return none: nothing here has to be kept from being zeroed."""
        return ()

    def build_connector_meta(self, scheduler_output: Any) -> None:
        """Return nothing: no worker is to be told."""

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Let the blocks of a finished request go at once."""
        return False, None


@functools.cache
def _transfers_class() -> type[Any]:
    parent = kv_connector_class()
    workers = dict.fromkeys(
        ("start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"), lambda self, *_: None
    )
    return type("SimulatedTransfers", (Transfers, parent), workers)


def transfers() -> Transfers:
    """Return a connector for `scheduler.connector`."""
    made: Transfers = _transfers_class()()
    return made
