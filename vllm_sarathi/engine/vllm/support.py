"""What of an engine's configuration we can keep: checked before a model loads, refused by a sentence."""

from vllm_sarathi.core.config import ConfigError, SarathiConfig
from vllm_sarathi.engine.vllm.internals import resolve
from vllm_sarathi.engine.vllm.protocols import VllmConfig


def uses_stock_only(vllm_config: VllmConfig) -> str | None:
    """Return why the model cannot be scheduled in chunks, or None where it can."""
    model = vllm_config.model_config
    if model.is_encoder_decoder:
        return "an encoder-decoder model, which prefills its prompt in one piece"
    if model.runner_type == "pooling":
        return "a pooling model, which generates no tokens"
    if model.is_diffusion:
        return "a diffusion model, which vLLM drives by a scheduler of its own"
    if vllm_config.is_mm_encoder_only:
        return "an instance that only encodes images or sound, and prefills no prompts"
    return None


def stock_scheduler_path(vllm_config: VllmConfig) -> str | None:
    """Return what `scheduler_cls` would be without us, None being vLLM's default.

    vLLM names a diffusion model's scheduler only while the field is empty, so we name it; vLLM 0.30 has none, and 0.31
    only the asynchronous one.
    """
    if not vllm_config.model_config.is_diffusion:
        return None
    kind = (
        "DiffusionAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "DiffusionScheduler"
    )
    try:
        resolve(f"vllm.v1.core.sched.diffusion_scheduler:{kind}")
    except (ImportError, AttributeError):
        return None
    return f"vllm.v1.core.sched.diffusion_scheduler.{kind}"


def check_engine(vllm_config: VllmConfig, config: SarathiConfig) -> None:
    """Check our settings against the engine's, as soon as both are known and before a model loads.

    Raises:
        ConfigError: the budget is above the engine's limit, below what one request needs, or the engine has a
            setting that is at odds with a scheduler that sizes steps by itself.
    """
    _check_combination(vllm_config, config)
    if config.token_budget is not None:
        _check_budget(vllm_config, config.token_budget)


def _check_combination(vllm_config: VllmConfig, config: SarathiConfig) -> None:
    scheduler_config, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
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
    if scheduler_config.prefill_schedule_interval > 1:
        raise ConfigError(
            f"--scheduler {config.scheduler}: --prefill-schedule-interval {scheduler_config.prefill_schedule_interval} "
            "keeps prompts out of steps that have room for them; valid: 1 (the default), or --scheduler default."
        )
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ConfigError(
            f"--scheduler {config.scheduler}: with --distributed-executor-backend external_launcher each of the "
            f"{parallel.world_size} ranks schedules for itself and all must decide alike, which measured times do "
            "not; valid: mp or ray, or --scheduler default."
        )


def _check_budget(vllm_config: VllmConfig, token_budget: int) -> None:
    scheduler_config = vllm_config.scheduler_config
    limit = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    if token_budget > limit:
        raise ConfigError(
            f"--token-budget {token_budget}: above the engine's limit of {limit} tokens per step; "
            f"valid: 1 to {limit}, or raise --max-num-batched-tokens."
        )
    # vLLM holds a request back until one token and all its draft tokens fit; a smaller budget never lets it in.
    least = 1 + vllm_config.num_speculative_tokens
    if token_budget < least:
        raise ConfigError(
            f"--token-budget {token_budget}: below the {least} tokens that one decode with "
            f"{least - 1} speculative tokens needs; valid: {least} to {limit}."
        )
