"""The only module that touches vLLM internals.

vLLM says that its scheduler interface is not public. Every class, method, parameter and attribute that we
lean on is listed in CONTRACT and *_ATTRIBUTES below; `check_contract` compares them with the vLLM that is
installed, so that an upgrade fails in one place, with a sentence that says what moved.

Importing this module imports no vLLM: the plugin is loaded in every vLLM process, and must cost nothing there.
"""

import functools
import importlib
import inspect
import itertools
import logging
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vllm_sarathi.core.config import ConfigError, SarathiConfig

TESTED_VERSIONS = ((0, 30), (0, 32))
"""First and last minor release of vLLM that the contract and the scheduler-level tests were run against."""

logger = logging.getLogger("vllm.vllm_sarathi")  # below "vllm", so that vLLM's own handlers print it


@dataclass(frozen=True)
class Touchpoint:
    """One thing of vLLM's that we use: a class or function, and the parameters that we pass or rely on."""

    path: str
    parameters: tuple[str, ...] = ()


CONTRACT = (
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
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.get_request_counts"),
    Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.shutdown"),
    Touchpoint("vllm.v1.core.sched.async_scheduler:AsyncScheduler"),
    Touchpoint("vllm.v1.core.sched.request_queue:RequestQueue.peek_request"),
    Touchpoint("vllm.v1.core.sched.request_queue:FCFSRequestQueue.pop_request"),
    Touchpoint("vllm.v1.core.sched.request_queue:FCFSRequestQueue.pop"),
    Touchpoint("vllm.v1.core.sched.request_queue:FCFSRequestQueue.prepend_request", ("request",)),
    Touchpoint("vllm.v1.core.sched.request_queue:FCFSRequestQueue.prepend_requests", ("requests",)),
    Touchpoint("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"),
    Touchpoint("vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY"),
    Touchpoint("vllm.v1.core.sched.interface:PauseState.UNPAUSED"),
    Touchpoint("vllm.v1.request:RequestStatus.WAITING"),
    Touchpoint("vllm.v1.request:RequestStatus.PREEMPTED"),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.add_cli_args", ("parser",)),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Touchpoint("vllm.engine.arg_utils:EngineArgs.create_engine_config"),
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
    # The scheduler without a model (engine/offline.py).
    Touchpoint("vllm.v1.core.kv_cache_utils:get_request_block_hasher"),
    Touchpoint("vllm.v1.core.kv_cache_utils:init_none_hash"),
    Touchpoint("vllm.utils.hashing:get_hash_fn_by_name"),
    Touchpoint(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.allocate_new_blocks",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Touchpoint(
        "vllm.v1.kv_cache_interface:FullAttentionSpec", ("block_size", "num_kv_heads", "head_size", "dtype")
    ),
    Touchpoint(
        "vllm.v1.kv_cache_interface:KVCacheConfig", ("num_blocks", "kv_cache_tensors", "kv_cache_groups")
    ),
    Touchpoint("vllm.v1.kv_cache_interface:KVCacheGroupSpec", ("layer_names", "kv_cache_spec")),
    Touchpoint("vllm.v1.outputs:ModelRunnerOutput", ("req_ids", "req_id_to_index", "sampled_token_ids")),
    Touchpoint("vllm.v1.structured_output:StructuredOutputManager"),
)

SCHEDULER_ATTRIBUTES = (
    "block_size",
    "kv_cache_manager",
    "log_stats",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_spec_tokens",
    "pause_state",
    "policy",
    "requests",
    "running",
    "scheduler_config",
    "vllm_config",
    "waiting",
)

REQUEST_ATTRIBUTES = (
    "arrival_time",
    "is_prefill_chunk",
    "num_computed_tokens",
    "num_output_tokens",
    "num_tokens",
    "priority",
    "request_id",
    "sampling_params",
    "spec_token_ids",
    "status",
    "streaming_queue",
)

ENGINE_ARGS_FIELDS = ("additional_config", "scheduler_cls")


class ContractError(RuntimeError):
    """The installed vLLM lacks something that we lean on."""


def tested_range() -> str:
    """Return the tested versions as a user reads them."""
    first, last = (".".join(map(str, v)) for v in TESTED_VERSIONS)
    return f"{first}.x to {last}.x"


def installed_version() -> str:
    """Return the version of the vLLM that this process imports.

    Raises:
        ImportError: there is none; the message names the extras that bring one.
    """
    return str(import_internal("vllm.version").__version__)


def import_internal(module: str) -> ModuleType:
    """Import a module of vLLM's.

    Raises:
        ImportError: vLLM is not installed; the message names the extras that bring it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "vllm" and "vllm" not in sys.modules:
            raise ImportError(
                "vllm_sarathi.engine needs vLLM, which is not installed: "
                "pip install 'vllm-sarathi[vllm]' (accelerators) or 'vllm-sarathi[cpu]' (CPU build)."
            ) from error
        raise


def scheduler_classes() -> tuple[type[Any], type[Any]]:
    """Return vLLM's synchronous and asynchronous scheduler classes.

    Raises:
        ImportError: vLLM is not installed.
        ContractError: this vLLM lacks something that we lean on.
    """
    sync = import_internal("vllm.v1.core.sched.scheduler").Scheduler
    check_contract()
    return sync, import_internal("vllm.v1.core.sched.async_scheduler").AsyncScheduler


def loaded_engine_args() -> Any | None:
    """Return vLLM's EngineArgs class if this process has loaded it; a process that has not has no command line."""
    module = sys.modules.get("vllm.engine.arg_utils")
    return getattr(module, "EngineArgs", None)


def is_priority_policy(scheduler: Any) -> bool:
    """True where waiting requests are ordered by priority first."""
    policy = import_internal("vllm.v1.core.sched.request_queue").SchedulingPolicy
    return bool(scheduler.policy == policy.PRIORITY)


def has_runnable_prefill(scheduler: Any) -> bool:
    """True where nothing but the token budget keeps a request from being scheduled: it is not blocked or paused."""
    if scheduler.pause_state != import_internal("vllm.v1.core.sched.interface").PauseState.UNPAUSED:
        return False
    if any(request.is_prefill_chunk for request in scheduler.running):
        return True
    if not scheduler.waiting:
        return False
    status = import_internal("vllm.v1.request").RequestStatus
    return scheduler.waiting.peek_request().status in (status.WAITING, status.PREEMPTED)


LIMITS = ("max_num_scheduled_tokens", "max_num_running_reqs", "max_num_active_reqs")
"""What bounds a step; `max_num_active_reqs` came with vLLM 0.31."""


def save_limits(scheduler: Any) -> list[tuple[str, int]]:
    """Return the limits of a step, for `restore_limits`."""
    return [(name, getattr(scheduler, name)) for name in LIMITS if hasattr(scheduler, name)]


def restore_limits(scheduler: Any, limits: list[tuple[str, int]]) -> None:
    """Put back what `save_limits` returned."""
    for name, value in limits:
        setattr(scheduler, name, value)


def set_limits(scheduler: Any, token_budget: int, hidden: int, admit: bool = True) -> None:
    """Set the token budget, and take the slots of requests that are hidden from `running` out of the count.

    Without `admit` no slot is left for a waiting request.
    """
    scheduler.max_num_scheduled_tokens = token_budget
    if hidden or not admit:
        for name in LIMITS[1:]:
            if hasattr(scheduler, name):
                left = getattr(scheduler, name) - hidden if admit else len(scheduler.running)
                setattr(scheduler, name, left)


def can_hide(scheduler: Any, decodes: int, first: Any | None) -> bool:
    """True where a step can do without preempting: a hidden request's KV blocks are out of the parent's reach.

    Args:
        scheduler: vLLM's.
        decodes: requests that decode in the step.
        first: the request that is to be read first; None for none.
    """
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    prompt_blocks = first.num_tokens // scheduler.block_size if first is not None else 0
    return bool(free > 2 * decodes + prompt_blocks + 2)


def has_slot(scheduler: Any) -> bool:
    """True where one more request may run."""
    limits = [getattr(scheduler, name) for name in LIMITS[1:] if hasattr(scheduler, name)]
    return bool(len(scheduler.running) < min(limits))


def reorder_waiting(scheduler: Any, requests: list[Any]) -> None:
    """Bring the first requests of the queue, as many as `requests`, into the order of `requests`."""
    queue = scheduler.waiting
    if all(a is b for a, b in zip(queue, requests, strict=False)):
        return
    for _ in requests:
        queue.pop_request()
    queue.prepend_requests(reversed(requests))


def move_to_front(scheduler: Any, request: Any) -> None:
    """Bring the request that was queued last to the head of the queue, unless it waits elsewhere."""
    queue = scheduler.waiting
    if len(queue) > 1 and queue[-1] is request:
        queue.pop()
        queue.prepend_request(request)


def sort_newest(scheduler: Any, names: set[str]) -> None:
    """Bring those requests, as far as they are the last of an FCFS queue, into the order of their lengths."""
    queue = scheduler.waiting
    newest = list(itertools.takewhile(lambda request: request.request_id in names, reversed(queue)))
    newest.reverse()  # prompts of the same length stay in their order
    # Sorted before any is taken out: an error in between would lose requests.
    ordered = sorted(newest, key=lambda request: request.num_tokens)
    for _ in ordered:
        queue.pop()
    queue.extend(ordered)


def uses_stock_only(vllm_config: Any) -> str | None:
    """Return why the model cannot be scheduled in chunks, or None where it can."""
    model = vllm_config.model_config
    if model.is_encoder_decoder:
        return "an encoder-decoder model, which reads its prompt in one piece"
    if model.runner_type == "pooling":
        return "a pooling model, which generates no tokens"
    if model.is_diffusion:
        return "a diffusion model, which vLLM drives by a scheduler of its own"
    return None


def stock_scheduler_path(vllm_config: Any) -> str | None:
    """Return what `scheduler_cls` would be without us, None being vLLM's default.

    vLLM names a diffusion model's scheduler only while the field is empty, so we name it.
    """
    if not vllm_config.model_config.is_diffusion:
        return None
    kind = (
        "DiffusionAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "DiffusionScheduler"
    )
    return f"vllm.v1.core.sched.diffusion_scheduler.{kind}"


def check_engine(vllm_config: Any, config: SarathiConfig) -> None:
    """Check our settings against the engine's, as soon as both are known and before a model loads.

    Raises:
        ConfigError: the budget is above the engine's limit, below what one request needs, or chunked
            prefill is off.
    """
    scheduler_config = vllm_config.scheduler_config
    if not scheduler_config.enable_chunked_prefill:
        raise ConfigError(
            f"--scheduler {config.scheduler}: chunked prefill is off (--no-enable-chunked-prefill), "
            "and a token budget is kept by chunking; leave it on, or use --scheduler default."
        )
    if config.prefill_order != "fcfs" and scheduler_config.policy != "fcfs":
        raise ConfigError(
            f"--prefill-order {config.prefill_order}: --scheduling-policy {scheduler_config.policy} orders the queue "
            "already; valid with --scheduling-policy fcfs."
        )
    if config.token_budget is None:
        return
    limit = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    if config.token_budget > limit:
        raise ConfigError(
            f"--token-budget {config.token_budget}: above the engine's limit of {limit} tokens per step; "
            f"valid: 1 to {limit}, or raise --max-num-batched-tokens."
        )
    # vLLM holds a request back until one token and all its draft tokens fit; a smaller budget never lets it in.
    least = 1 + vllm_config.num_speculative_tokens
    if config.token_budget < least:
        raise ConfigError(
            f"--token-budget {config.token_budget}: below the {least} tokens that one decode with "
            f"{least - 1} speculative tokens needs; valid: {least} to {limit}."
        )


def _resolve(path: str) -> Any:
    module, _, qualname = path.partition(":")
    return functools.reduce(getattr, qualname.split("."), import_internal(module))


def _parameters_missing(function: Any, wanted: tuple[str, ...]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    names = {p.name for p in parameters}
    return [name for name in wanted if name not in names]


def touchpoint_violations(touchpoint: Touchpoint) -> list[str]:
    """Return one sentence for each way in which the installed vLLM differs from a touchpoint."""
    try:
        target = _resolve(touchpoint.path)
    except (ImportError, AttributeError) as error:
        return [f"{touchpoint.path} is gone ({error})."]
    missing = _parameters_missing(target, touchpoint.parameters) if touchpoint.parameters else []
    return [f"{touchpoint.path} no longer takes {name!r}." for name in missing]


def contract_violations() -> list[str]:
    """Return one sentence for each thing that the installed vLLM lacks or has moved; empty if all is there."""
    violations = [said for touchpoint in CONTRACT for said in touchpoint_violations(touchpoint)]
    violations += _missing_request_attributes()
    engine_args = import_internal("vllm.engine.arg_utils").EngineArgs
    fields = engine_args.__dataclass_fields__
    violations += [f"EngineArgs has no field {name!r}." for name in ENGINE_ARGS_FIELDS if name not in fields]
    return violations


def _missing_request_attributes() -> list[str]:
    try:
        request = _resolve("vllm.v1.request:Request")(
            request_id="contract",
            prompt_token_ids=[0],
            sampling_params=import_internal("vllm.sampling_params").SamplingParams(max_tokens=1),
            pooling_params=None,
            arrival_time=0.0,
        )
    except TypeError as error:
        return [f"vllm.v1.request:Request is built otherwise ({error})."]
    return [
        f"Request has no attribute {name!r}." for name in REQUEST_ATTRIBUTES if not hasattr(request, name)
    ]


def missing_scheduler_attributes(scheduler: Any) -> list[str]:
    """Return one sentence for each attribute that a scheduler object of this vLLM lacks."""
    return [f"Scheduler has no attribute {n!r}." for n in SCHEDULER_ATTRIBUTES if not hasattr(scheduler, n)]


def raise_violations(violations: list[str]) -> None:
    """Raise ContractError that says what moved, if anything did."""
    if violations:
        raise ContractError(
            f"vLLM {installed_version()} does not fit vllm-sarathi, which is tested with {tested_range()}: "
            + " ".join(violations)
        )


@functools.cache
def check_contract() -> None:
    """Check the installed vLLM once per process.

    Raises:
        ContractError: something that we lean on is gone; the message says what, and names the tested range.
    """
    raise_violations(contract_violations())
    version = installed_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED_VERSIONS[0] <= numbers <= TESTED_VERSIONS[1]:
        logger.warning(
            "vLLM %s is not among the versions that vllm-sarathi is tested with (%s).",
            version,
            tested_range(),
        )
