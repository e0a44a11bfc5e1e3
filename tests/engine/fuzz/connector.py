"""A KV connector without a network: loads and sends end when the fuzz says so, well or not."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus


class LateConnector(KVConnectorBase_V1, SupportsHMA):
    """Holds what a request's `kv_transfer_params` say that another engine holds.

    `remote_tokens`: how much of the prompt is there; `async`: whether it is loaded between steps; `unsure`: how many
    times the connector does not know yet; `send`: whether blocks are kept until they have been sent.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.one_group = len(kv_cache_config.kv_cache_groups) == 1
        self.block_size = vllm_config.cache_config.block_size
        self.unsure: dict[str, int] = {}
        self.loading: dict[str, list[int]] = {}
        self.loaded: set[str] = set()
        self.sending: list[str] = []
        self.finished: set[str] = set()
        self._told = KVConnectorOutput()

    # --- The scheduler's side ---

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        params = request.kv_transfer_params or {}
        name = request.request_id
        left = self.unsure.setdefault(name, params.get("unsure", 0))
        if left:
            self.unsure[name] = left - 1
            return None, False
        if name in self.loaded:
            return 0, False
        end = min(params.get("remote_tokens", 0), request.num_tokens - 1)
        tokens = end // self.block_size * self.block_size - num_computed_tokens
        return (tokens, bool(params.get("async"))) if tokens > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        name = request.request_id
        assert name not in self.loaded, "the same tokens are loaded twice"
        self.loaded.add(name)
        if (request.kv_transfer_params or {}).get("async"):
            first = (request.num_tokens - num_external_tokens) // self.block_size
            self.loading[name] = list(blocks.get_block_ids()[0][max(0, first - 1) :])

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        name = request.request_id
        assert name not in self.finished, "a request finishes twice"
        self.finished.add(name)
        ended = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        send = ended and bool((request.kv_transfer_params or {}).get("send"))
        if send:
            self.sending.append(name)
        return send, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # --- What the fuzz lets happen, and what the workers tell of it ---

    def end_load(self, index: int, well: bool) -> None:
        """End one of the loads that are under way."""
        if not self.loading:
            return
        name = sorted(self.loading)[index % len(self.loading)]
        blocks = self.loading.pop(name)
        self._told.finished_recving = (self._told.finished_recving or set()) | {name}
        if not well and self.one_group and blocks:
            self._told.invalid_block_ids |= set(blocks[len(blocks) // 2 :])
        elif not well:
            self._told.failed_recving = self._told.failed_recving | {name}

    def end_send(self) -> None:
        """End the first of the sends that are under way."""
        if self.sending:
            self._told.finished_sending = (self._told.finished_sending or set()) | {self.sending.pop(0)}

    def take_output(self) -> KVConnectorOutput | None:
        """Return what the workers tell after a step, or None for nothing."""
        told, self._told = self._told, KVConnectorOutput()
        return None if told.is_empty() else told

    # --- The workers' side, which has nothing to do here ---

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError
