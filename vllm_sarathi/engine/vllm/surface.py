"""Every name of vLLM's that we lean on: CONTRACT for classes and functions, SURFACES for their objects' attributes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Touchpoint:
    """One thing of vLLM's that we use: a class or function, and the parameters that we pass or rely on."""

    path: str
    parameters: tuple[str, ...] = ()


CONTRACT = (
    Touchpoint("vllm.version:__version__"),
    Touchpoint("vllm.platforms:current_platform"),
    Touchpoint(
        "vllm.sampling_params:SamplingParams", ("max_tokens", "ignore_eos", "temperature", "extra_args")
    ),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler"),
    Touchpoint(
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        ("vllm_config", "kv_cache_config", "structured_output_manager", "block_size", "log_stats"),
    ),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.schedule"),
    Touchpoint(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
    ),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.add_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler._free_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request", ("request",)),
    Touchpoint(
        "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.get_request_counts"),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.finish_requests", ("request_ids", "finished_status")),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.shutdown"),
    Touchpoint("vllm.v1.core.sched.async_scheduler:AsyncScheduler"),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue"),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.add_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.pop_request"),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.peek_request"),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.prepend_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests", ("requests",)),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.remove_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.remove_requests", ("requests",)),
    Touchpoint("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"),
    Touchpoint("vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY"),
    Touchpoint("vllm.v1.core.sched.interface:PauseState.PAUSED_ALL"),
    Touchpoint("vllm.v1.core.sched.interface:PauseState.UNPAUSED"),
    Touchpoint(
        "vllm.v1.request:Request",
        (
            "request_id",
            "prompt_token_ids",
            "sampling_params",
            "pooling_params",
            "arrival_time",
            "block_hasher",
        ),
    ),
    Touchpoint("vllm.v1.request:RequestStatus.FINISHED_ABORTED"),
    Touchpoint("vllm.v1.request:RequestStatus.RUNNING"),
    Touchpoint("vllm.v1.request:RequestStatus.WAITING"),
    Touchpoint("vllm.v1.request:RequestStatus.WAITING_FOR_REMOTE_KVS"),
    Touchpoint("vllm.v1.request:RequestStatus.WAITING_FOR_STREAMING_REQ"),
    Touchpoint("vllm.v1.request:RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.create_engine_config"),
    # Refusals (engine/admission.py, engine/http.py).
    Touchpoint(
        "vllm.v1.engine:EngineCoreOutput",
        ("request_id", "new_token_ids", "finish_reason", "stop_reason", "events", "trace_headers"),
    ),
    Touchpoint("vllm.v1.engine:EngineCoreOutputs"),
    Touchpoint("vllm.v1.engine.async_llm:AsyncLLM.generate"),
    # An engine in this process (engine/inprocess.py).
    Touchpoint("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", ("parser",)),
    Touchpoint("vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER"),
    Touchpoint("vllm.utils.argparse_utils:FlexibleArgumentParser"),
    Touchpoint(
        "vllm.v1.engine.llm_engine:LLMEngine.from_vllm_config",
        ("vllm_config", "usage_context", "disable_log_stats"),
    ),
    Touchpoint("vllm.v1.engine.llm_engine:LLMEngine.add_request", ("request_id", "prompt", "params")),
    Touchpoint("vllm.v1.engine.llm_engine:LLMEngine.abort_request", ("request_ids",)),
    Touchpoint("vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests"),
    Touchpoint("vllm.v1.engine.llm_engine:LLMEngine.step"),
    # An engine core that is asked something by name (utility.py).
    Touchpoint("vllm.v1.engine.core:EngineCore"),
    # The scheduler without a model (engine/offline.py).
    Touchpoint("vllm.v1.core.kv_cache_utils:get_request_block_hasher"),
    Touchpoint("vllm.v1.core.kv_cache_utils:init_none_hash"),
    Touchpoint("vllm.utils.hashing:get_hash_fn_by_name"),
    Touchpoint(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.allocate_new_blocks",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Touchpoint(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        ("block_hashes", "max_cache_hit_length"),
    ),
    Touchpoint("vllm.v1.core.block_pool:BlockPool.get_cached_block", ("block_hash", "kv_cache_group_ids")),
    Touchpoint(
        "vllm.v1.kv_cache_interface:FullAttentionSpec", ("block_size", "num_kv_heads", "head_size", "dtype")
    ),
    Touchpoint(
        "vllm.v1.kv_cache_interface:KVCacheConfig", ("num_blocks", "kv_cache_tensors", "kv_cache_groups")
    ),
    Touchpoint("vllm.v1.kv_cache_interface:KVCacheGroupSpec", ("layer_names", "kv_cache_spec")),
    Touchpoint("vllm.v1.outputs:ModelRunnerOutput", ("req_ids", "req_id_to_index", "sampled_token_ids")),
    Touchpoint("vllm.v1.structured_output:StructuredOutputManager"),
    # Prompts that another engine has read, without a device (transfers.py).
    Touchpoint("vllm.v1.outputs:KVConnectorOutput", ("finished_recving",)),
    Touchpoint(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.get_num_new_matched_tokens",
        ("request", "num_computed_tokens"),
    ),
    Touchpoint(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.update_state_after_alloc",
        ("request", "blocks"),
    ),
    Touchpoint(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.build_connector_meta",
        ("scheduler_output",),
    ),
    Touchpoint(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.request_finished", ("request",)
    ),
)


@dataclass(frozen=True)
class Surface:
    """What we read, set or call on one kind of vLLM's objects.

    Attributes:
        kind: vLLM's name of it.
        root: what leads to one: a scheduler, a request, an engine, or the class itself where we are only handed one.
        at: the dotted path from the root; for a class, where it is.
        attributes: what every supported version has.
        some: what only some supported versions have; who uses it asks first.
    """

    kind: str
    root: Literal["scheduler", "request", "engine", "class"]
    at: str
    attributes: tuple[str, ...]
    some: tuple[str, ...] = ()


SURFACES = (
    Surface(
        "Scheduler",
        "scheduler",
        "",
        (
            "_free_request",
            "_handle_blocked_waiting_request",
            "_try_schedule_encoder_inputs",
            "add_request",
            "block_size",
            "connector",
            "ec_connector",
            "encoder_cache_manager",
            "finish_requests",
            "finished_recving_kv_req_ids",
            "get_request_counts",
            "grammar_compile_error_reqs",
            "has_requests",
            "kv_cache_config",
            "kv_cache_manager",
            "log_stats",
            "lora_config",
            "max_model_len",
            "max_num_encoder_input_tokens",
            "max_num_running_reqs",
            "max_num_scheduled_tokens",
            "need_mamba_block_aligned_split",
            "num_lookahead_tokens",
            "num_prefill_lookahead",
            "num_spec_tokens",
            "num_waiting_for_streaming_input",
            "pause_state",
            "policy",
            "prev_step_scheduled_req_ids",
            "requests",
            "running",
            "schedule",
            "scheduler_config",
            "shutdown",
            "update_from_output",
            "use_v2_model_runner",
            "vllm_config",
            "waiting",
        ),
        some=("kv_holding_waiting", "max_num_active_reqs", "prefix_replay_tokens", "skipped_waiting"),
    ),
    Surface(
        "RequestQueue",
        "scheduler",
        "waiting",
        (
            "add_request",
            "pop_request",
            "prepend_request",
            "prepend_requests",
            "remove_request",
            "remove_requests",
        ),
    ),
    Surface(
        "KVCacheManager",
        "scheduler",
        "kv_cache_manager",
        ("block_pool", "coordinator", "enable_caching", "get_block_ids", "watermark_blocks"),
    ),
    Surface(
        "KVCacheCoordinator",
        "scheduler",
        "kv_cache_manager.coordinator",
        ("find_longest_cache_hit", "single_type_managers"),
        some=("eagle_group_ids",),
    ),
    Surface(
        "BlockPool",
        "scheduler",
        "kv_cache_manager.block_pool",
        ("get_cached_block", "get_num_free_blocks"),
    ),
    Surface(
        "VllmConfig",
        "scheduler",
        "vllm_config",
        (
            "additional_config",
            "cache_config",
            "is_mm_encoder_only",
            "lora_config",
            "model_config",
            "num_speculative_tokens",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Surface(
        "SchedulerConfig",
        "scheduler",
        "vllm_config.scheduler_config",
        (
            "async_scheduling",
            "disable_chunked_mm_input",
            "enable_chunked_prefill",
            "get_scheduler_cls",
            "long_prefill_token_threshold",
            "max_num_batched_tokens",
            "max_num_scheduled_tokens",
            "max_num_seqs",
            "policy",
            "prefill_schedule_interval",
            "scheduler_cls",
        ),
    ),
    Surface(
        "CacheConfig",
        "scheduler",
        "vllm_config.cache_config",
        ("block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks", "prefix_caching_hash_algo"),
    ),
    Surface(
        "ParallelConfig",
        "scheduler",
        "vllm_config.parallel_config",
        (
            "data_parallel_rank",
            "data_parallel_size",
            "distributed_executor_backend",
            "enable_expert_parallel",
            "pipeline_parallel_size",
            "tensor_parallel_size",
            "world_size",
        ),
        some=("data_parallel_index",),
    ),
    Surface(
        "ModelConfig",
        "scheduler",
        "vllm_config.model_config",
        (
            "dtype",
            "enforce_eager",
            "get_vocab_size",
            "is_diffusion",
            "is_encoder_decoder",
            "is_mm_prefix_lm",
            "max_model_len",
            "model",
            "quantization",
            "revision",
            "runner_type",
        ),
    ),
    Surface("LoRAConfig", "scheduler", "lora_config", ("max_loras",)),
    Surface(
        "EncoderCacheManager",
        "class",
        "vllm.v1.core.encoder_cache_manager:EncoderCacheManager",
        (),
        some=("cached", "num_freeable_slots"),
    ),
    Surface("SpeculativeConfig", "scheduler", "vllm_config.speculative_config", ("method",)),
    Surface(
        "Request",
        "request",
        "",
        (
            "_all_token_ids",
            "_output_token_ids",
            "arrival_time",
            "block_hashes",
            "client_index",
            "drop_stale_output",
            "get_finished_reason",
            "get_num_encoder_embeds",
            "has_encoder_inputs",
            "is_finished",
            "is_prefill_chunk",
            "kv_transfer_params",
            "lora_request",
            "max_tokens",
            "mm_features",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "num_output_tokens",
            "num_prompt_tokens",
            "num_stale_output_tokens",
            "num_tokens",
            "priority",
            "request_id",
            "sampling_params",
            "skip_reading_prefix_cache",
            "spec_token_ids",
            "status",
            "streaming_queue",
            "structured_output_request",
            "take_events",
            "trace_headers",
            "update_block_hashes",
        ),
    ),
    Surface("SamplingParams", "request", "sampling_params", ("extra_args",)),
    Surface(
        "SingleTypeKVCacheManager",
        "class",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        ("allocate_new_blocks",),
        some=("block_size", "mamba_cache_mode", "max_admission_blocks_per_request", "num_speculative_blocks"),
    ),
    Surface("KVCacheBlock", "class", "vllm.v1.core.kv_cache_utils:KVCacheBlock", ("is_null", "ref_cnt")),
    Surface("KVCacheConfig", "scheduler", "kv_cache_config", ("kv_cache_groups",)),
    Surface("KVCacheGroupSpec", "class", "vllm.v1.kv_cache_interface:KVCacheGroupSpec", ("kv_cache_spec",)),
    Surface(
        "MultiModalFeatureSpec",
        "class",
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        ("identifier", "mm_position"),
    ),
    Surface("PlaceholderRange", "class", "vllm.multimodal.inputs:PlaceholderRange", ("length", "offset")),
    Surface(
        "StructuredOutputRequest",
        "class",
        "vllm.v1.structured_output.request:StructuredOutputRequest",
        ("grammar",),
    ),
    Surface("LoRARequest", "class", "vllm.lora.request:LoRARequest", ("lora_int_id",)),
    Surface(
        "SchedulerOutput",
        "class",
        "vllm.v1.core.sched.output:SchedulerOutput",
        ("num_scheduled_tokens", "scheduled_encoder_inputs", "total_num_scheduled_tokens"),
    ),
    Surface("EngineCoreOutputs", "class", "vllm.v1.engine:EngineCoreOutputs", ("outputs",)),
    Surface(
        "EngineCoreOutput",
        "class",
        "vllm.v1.engine:EngineCoreOutput",
        ("finish_reason", "request_id", "stop_reason"),
    ),
    Surface("CompletionOutput", "class", "vllm.outputs:CompletionOutput", ("stop_reason",)),
    Surface(
        "EngineArgs",
        "class",
        "vllm.engine.arg_utils:EngineArgs",
        ("add_cli_args", "additional_config", "create_engine_config", "from_cli_args", "scheduler_cls"),
    ),
    Surface("Platform", "class", "vllm.platforms.interface:Platform", ("get_device_name", "is_cpu")),
    Surface(
        "LLMEngine",
        "engine",
        "",
        ("abort_request", "add_request", "engine_core", "has_unfinished_requests", "step", "vllm_config"),
    ),
    Surface("InprocClient", "engine", "engine_core", ("engine_core", "shutdown")),
    Surface("EngineCore", "engine", "engine_core.engine_core", ("scheduler",)),
    # The way from an API server to an engine core (utility.py).
    Surface(
        "AsyncMPClient",
        "class",
        "vllm.v1.engine.core_client:AsyncMPClient",
        ("call_utility_async",),
        some=("call_utility_all_async",),
    ),
)
