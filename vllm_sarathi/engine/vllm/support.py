"""What of an engine's configuration we can keep: checked before a model loads, refused by a sentence."""

from typing import Any

from vllm_sarathi.core.config import ConfigError, SarathiConfig


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
