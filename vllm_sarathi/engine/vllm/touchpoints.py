"""Every class and function of vLLM's that we lean on; the attributes of their objects are in `surface`."""

from dataclasses import dataclass


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
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler._preempt_request", ("request",)),
    Touchpoint(
        "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.get_request_counts"),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.finish_requests", ("request_ids", "finished_status")),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.shutdown"),
    Touchpoint("vllm.v1.core.sched.async_scheduler:AsyncScheduler"),
    Touchpoint("vllm.v1.core.sched.output:SchedulerOutput.make_empty"),
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
    Touchpoint("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", ("engine_core_outputs",)),
    Touchpoint("vllm.exceptions:GenerationError", ("message",)),
    Touchpoint(
        "vllm.outputs:RequestOutput",
        ("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"),
    ),
    Touchpoint(
        "vllm.outputs:CompletionOutput",
        ("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"),
    ),
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
