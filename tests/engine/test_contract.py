"""The contract with vLLM: what we lean on is there, and what is missing is said."""

import functools
from typing import Any

import pytest

from tests.engine.modelled import ModelledEngine
from vllm_sarathi import SarathiConfig
from vllm_sarathi.engine import vllm_api


@pytest.fixture
def fresh_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget that this process has been checked."""
    monkeypatch.setattr(vllm_api, "check_contract", functools.cache(vllm_api.check_contract.__wrapped__))


@pytest.mark.parametrize("touchpoint", vllm_api.CONTRACT, ids=lambda t: t.path.partition(":")[2])
def test_the_installed_vllm_has(touchpoint: vllm_api.Touchpoint) -> None:
    assert vllm_api.touchpoint_violations(touchpoint) == []


def test_the_installed_vllm_breaks_nothing_of_the_contract(make_config: Any) -> None:
    assert vllm_api.contract_violations() == []
    scheduler = ModelledEngine(make_config(SarathiConfig(token_budget=16))).scheduler
    assert vllm_api.missing_scheduler_attributes(scheduler) == []


@pytest.mark.parametrize(
    ("touchpoint", "said"),
    [
        (vllm_api.Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.plan"), "Scheduler.plan is gone"),
        (vllm_api.Touchpoint("vllm.v1.core.nowhere:Scheduler"), "vllm.v1.core.nowhere:Scheduler is gone"),
        (
            vllm_api.Touchpoint("vllm.v1.core.sched.scheduler:Scheduler.add_request", ("prompt",)),
            "Scheduler.add_request no longer takes 'prompt'",
        ),
    ],
)
def test_what_moved_is_said_with_the_tested_range(
    fresh_check: None, monkeypatch: pytest.MonkeyPatch, touchpoint: vllm_api.Touchpoint, said: str
) -> None:
    monkeypatch.setattr(vllm_api, "CONTRACT", (touchpoint,))
    with pytest.raises(vllm_api.ContractError, match=said) as error:
        vllm_api.scheduler_classes()
    assert vllm_api.tested_range() in str(error.value)
    assert vllm_api.installed_version() in str(error.value)


def test_a_missing_attribute_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_api, "REQUEST_ATTRIBUTES", ("num_tokens", "is_a_prefill"))
    assert vllm_api.contract_violations() == ["Request has no attribute 'is_a_prefill'."]
    assert "Scheduler has no attribute 'running'." in vllm_api.missing_scheduler_attributes(object())


def test_an_untested_version_warns_once(
    fresh_check: None, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    monkeypatch.setattr(vllm_api, "installed_version", lambda: "0.99.1+cpu")
    vllm_api.check_contract()
    vllm_api.check_contract()
    assert warned == [
        f"vLLM 0.99.1+cpu is not among the versions that vllm-sarathi is tested with ({vllm_api.tested_range()})."
    ]
