"""What we read of vLLM's requests, step outputs and configuration, for the type checker.

A class here has vLLM's name, and of vLLM's attributes those that `surface` lists, as far as modules of the engine read
them. vLLM's scheduler itself and its KV-cache managers stay `Any`: their attributes differ between versions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class PlaceholderRange(Protocol):
    """Where an image or sound stands in a prompt: its first token, and how many."""

    offset: int
    length: int


class MultiModalFeatureSpec(Protocol):
    """An image or sound in a prompt."""

    identifier: str
    mm_position: PlaceholderRange


class LoRARequest(Protocol):
    """The adapter that a request asks for; numbers count from 1."""

    lora_int_id: int


class StructuredOutputRequest(Protocol):
    """The grammar that a request asks for: None while it compiles, and an exception where it does not compile."""

    grammar: Any


class Request(Protocol):
    """A request of the scheduler's."""

    request_id: str
    arrival_time: float
    block_hashes: Sequence[Any]
    client_index: int
    drop_stale_output: bool
    is_prefill_chunk: bool
    kv_transfer_params: dict[str, Any] | None
    lora_request: LoRARequest | None
    max_tokens: int
    mm_features: Sequence[MultiModalFeatureSpec]
    num_computed_tokens: int
    num_output_placeholders: int
    num_prompt_tokens: int
    num_stale_output_tokens: int
    priority: int
    sampling_params: Any
    skip_reading_prefix_cache: bool
    spec_token_ids: Sequence[int]
    status: Any
    structured_output_request: StructuredOutputRequest | None
    trace_headers: Mapping[str, str] | None

    @property
    def has_encoder_inputs(self) -> bool: ...

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def get_finished_reason(self) -> Any: ...

    def get_num_encoder_embeds(self, input_id: int) -> int: ...

    def is_finished(self) -> bool: ...

    def take_events(self) -> Any: ...


class SchedulerOutput(Protocol):
    """What a step is to compute."""

    num_scheduled_tokens: Mapping[str, int]
    scheduled_encoder_inputs: Mapping[str, Sequence[int]]
    total_num_scheduled_tokens: int


class SchedulerConfig(Protocol):
    """The scheduler's settings."""

    async_scheduling: bool | None
    enable_chunked_prefill: bool
    max_num_batched_tokens: int
    max_num_scheduled_tokens: int | None
    policy: str
    prefill_schedule_interval: int
    scheduler_cls: Any


class CacheConfig(Protocol):
    """The KV cache's settings."""

    block_size: int
    cache_dtype: str
    enable_prefix_caching: bool
    prefix_caching_hash_algo: str


class ParallelConfig(Protocol):
    """How an engine is spread over devices."""

    data_parallel_rank: int
    data_parallel_size: int
    distributed_executor_backend: Any
    enable_expert_parallel: bool
    pipeline_parallel_size: int
    tensor_parallel_size: int
    world_size: int


class ModelConfig(Protocol):
    """The model's settings."""

    dtype: Any
    enforce_eager: bool
    model: str
    quantization: Any
    revision: str | None
    runner_type: str

    @property
    def is_diffusion(self) -> bool: ...

    @property
    def is_encoder_decoder(self) -> bool: ...

    @property
    def is_mm_prefix_lm(self) -> bool: ...


class SpeculativeConfig(Protocol):
    """How drafts are made."""

    method: str | None


class VllmConfig(Protocol):
    """An engine's whole configuration."""

    additional_config: Any
    cache_config: CacheConfig
    lora_config: Any
    model_config: ModelConfig
    parallel_config: ParallelConfig
    scheduler_config: SchedulerConfig
    speculative_config: SpeculativeConfig | None

    @property
    def is_mm_encoder_only(self) -> bool: ...

    @property
    def num_speculative_tokens(self) -> int: ...
