"""vLLM's classes and functions by the names that we call them; each is imported when it is asked for.

Every string of the form `module:name` here has an entry in `contract.CONTRACT`; a test compares the two.
"""

import functools
import importlib
import logging
import sys
from types import ModuleType
from typing import Any

from vllm_sarathi.core.errors import VllmMissingError
from vllm_sarathi.engine.vllm.protocols import VllmConfig

logger = logging.getLogger("vllm.vllm_sarathi")  # below "vllm", so that vLLM's own handlers print it


def import_internal(module: str) -> ModuleType:
    """Import a module of vLLM's.

    Raises:
        VllmMissingError: vLLM is not installed; the message names the extras that bring it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "vllm" and "vllm" not in sys.modules:
            raise VllmMissingError("the scheduler") from error
        raise


def resolve(path: str) -> Any:
    """Return what `module:name` names; the name may have dots.

    Raises:
        ImportError: vLLM is not installed, or has no such module.
        AttributeError: the module has no such name.
    """
    module, _, qualname = path.partition(":")
    return functools.reduce(getattr, qualname.split("."), import_internal(module))


def installed_version() -> str:
    """Return the version of the vLLM that this process imports.

    Raises:
        ImportError: there is none; the message names the extras that bring one.
    """
    return str(resolve("vllm.version:__version__"))


def loaded_engine_args() -> Any | None:
    """Return vLLM's EngineArgs class if this process has loaded it; a process that has not has no command line."""
    module = sys.modules.get("vllm.engine.arg_utils")
    return getattr(module, "EngineArgs", None)


def engine_args_class() -> Any:
    """Return what an engine's arguments are an object of."""
    return resolve("vllm.engine.arg_utils:EngineArgs")


def server_args_class() -> Any:
    """Return what a server's engine's arguments are an object of."""
    return resolve("vllm.engine.arg_utils:AsyncEngineArgs")


def argument_parser_class() -> Any:
    """Return the parser of vLLM's command line."""
    return resolve("vllm.utils.argparse_utils:FlexibleArgumentParser")


def server_context() -> Any:
    """Return the usage context of `vllm serve`."""
    return resolve("vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER")


def llm_engine_class() -> Any:
    """Return the engine that is driven step by step."""
    return resolve("vllm.v1.engine.llm_engine:LLMEngine")


def current_platform() -> Any:
    """Return the kind of device that vLLM runs on."""
    return resolve("vllm.platforms:current_platform")


def sampling_params_class() -> Any:
    """Return what a request's parameters are an object of."""
    return resolve("vllm.sampling_params:SamplingParams")


def request_class() -> Any:
    """Return what the scheduler's requests are objects of."""
    return resolve("vllm.v1.request:Request")


@functools.cache  # a simulation asks in every step
def model_output_class() -> Any:
    """Return what a finished step is told with."""
    return resolve("vllm.v1.outputs:ModelRunnerOutput")


@functools.cache
def scheduler_output_class() -> Any:
    """Return what a scheduled step is told with."""
    return resolve("vllm.v1.core.sched.output:SchedulerOutput")


def kv_connector_class() -> Any:
    """Return what a KV connector is an object of."""
    return resolve("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1")


def kv_connector_output_class() -> Any:
    """Return what a step's output says of KV transfers with."""
    return resolve("vllm.v1.outputs:KVConnectorOutput")


def engine_core_output_class() -> Any:
    """Return what a request's news from the engine core are an object of."""
    return resolve("vllm.v1.engine:EngineCoreOutput")


def engine_core_outputs_class() -> Any:
    """Return what the news for one API server are an object of."""
    return resolve("vllm.v1.engine:EngineCoreOutputs")


def async_engine_class() -> Any:
    """Return the engine of an API server."""
    return resolve("vllm.v1.engine.async_llm:AsyncLLM")


def output_processor_class() -> Any:
    """Return what an API server hands the news from the engine core to."""
    return resolve("vllm.v1.engine.output_processor:OutputProcessor")


def request_output_class() -> Any:
    """Return what a request's answer is an object of."""
    return resolve("vllm.outputs:RequestOutput")


def completion_output_class() -> Any:
    """Return what one of the answers to a prompt is an object of."""
    return resolve("vllm.outputs:CompletionOutput")


def generation_error_class() -> Any:
    """Return the errors that vLLM answers with their status, and without a traceback in the log."""
    return resolve("vllm.exceptions:GenerationError")


def grammar_manager_class() -> Any:
    """Return what compiles grammars for structured output."""
    return resolve("vllm.v1.structured_output:StructuredOutputManager")


def full_attention_spec_class() -> Any:
    """Return what describes the KV cache of a layer with full attention."""
    return resolve("vllm.v1.kv_cache_interface:FullAttentionSpec")


def kv_cache_group_class() -> Any:
    """Return what describes the layers that share a block table."""
    return resolve("vllm.v1.kv_cache_interface:KVCacheGroupSpec")


def kv_cache_config_class() -> Any:
    """Return what describes a KV cache."""
    return resolve("vllm.v1.kv_cache_interface:KVCacheConfig")


def request_block_hasher(config: VllmConfig) -> Any:
    """Return what hashes a request's blocks as the engine core of this configuration does."""
    hash_block = resolve("vllm.utils.hashing:get_hash_fn_by_name")(
        config.cache_config.prefix_caching_hash_algo
    )
    resolve("vllm.v1.core.kv_cache_utils:init_none_hash")(hash_block)
    hasher = resolve("vllm.v1.core.kv_cache_utils:get_request_block_hasher")
    return hasher(config.cache_config.block_size, hash_block)


@functools.cache
def request_status() -> Any:
    """Return the states of a request."""
    return resolve("vllm.v1.request:RequestStatus")


@functools.cache
def pause_state() -> Any:
    """Return the states of a pause."""
    return resolve("vllm.v1.core.sched.interface:PauseState")


def is_priority_policy(scheduler: Any) -> bool:
    """True where waiting requests are ordered by priority first."""
    return bool(scheduler.policy == resolve("vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY"))


def engine_rank(vllm_config: VllmConfig) -> int:
    """Return which of the engines of a data-parallel deployment this is.

    The engines of a dense model work by themselves, and vLLM has each think that it is the only one; where it keeps
    their number all the same, that is it.
    """
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
