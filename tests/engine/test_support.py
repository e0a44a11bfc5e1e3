"""What of an engine's settings we cannot keep: refused before a model loads, or handed to vLLM's own scheduler."""

import copy
from typing import Any

import pytest

from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.engine.vllm.support import check_engine, stock_scheduler_path, uses_stock_only

SARATHI = SarathiConfig()


def test_an_ordinary_engine_is_taken(make_config: Any) -> None:
    check_engine(make_config(), SARATHI)
    assert uses_stock_only(make_config()) is None


def test_an_interval_of_prefills_is_refused(make_config: Any) -> None:
    config = make_config()
    config.scheduler_config.prefill_schedule_interval = 4
    with pytest.raises(ConfigError, match=r"--prefill-schedule-interval 4 .*valid: 1 "):
        check_engine(config, SARATHI)


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_that_schedule_for_themselves_are_refused(make_config: Any, ranks: int) -> None:
    config = make_config()
    config.parallel_config.distributed_executor_backend = "external_launcher"
    config.parallel_config.world_size = ranks
    if ranks == 1:
        check_engine(config, SARATHI)
        return
    with pytest.raises(ConfigError, match=r"external_launcher each of the 4 ranks .*valid: mp or ray"):
        check_engine(config, SARATHI)


def test_an_instance_that_only_encodes_is_left_to_vllm(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setattr(type(config), "is_mm_encoder_only", True)
    assert uses_stock_only(config) == "an instance that only encodes images or sound, and prefills no prompts"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_diffusion_models_scheduler_is_named_where_this_vllm_has_one(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    config = make_config(mode="async" if asynchronous else "sync")
    assert stock_scheduler_path(config) is None
    config.model_config = copy.copy(config.model_config)
    monkeypatch.setattr(type(config.model_config), "is_diffusion", True)
    path = stock_scheduler_path(config)
    if path is not None:  # it can be loaded
        config.scheduler_config.scheduler_cls = path
        assert ("Async" in config.scheduler_config.get_scheduler_cls().__name__) == asynchronous
    monkeypatch.setattr("vllm_sarathi.engine.vllm.support.resolve", _absent)
    assert stock_scheduler_path(config) is None


def _absent(path: str) -> Any:
    raise AttributeError(path)
