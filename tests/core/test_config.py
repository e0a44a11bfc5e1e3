"""SarathiConfig: strict about names, types and ranges, and invisible to vLLM's compile cache."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.core.config import (
    CONFIG_KEY,
    ConfigCarrier,
    ConfigError,
    SarathiConfig,
    config_from_additional,
    read_config_file,
)


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, float("nan"), [64]])
def test_a_bad_budget_is_named_with_what_is_valid(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"--token-budget .*: must be a whole number of at least 1"
    ) as error:
        SarathiConfig(token_budget=value)
    assert repr(value) in str(error.value)


def test_an_unknown_key_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'token_buget'; did you mean 'token_budget'\?"):
        SarathiConfig.from_mapping({"token_buget": 64})


def test_an_unknown_scheduler_gets_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"--scheduler 'saratih': unknown scheduler; did you mean 'sarathi'\?"
    ):
        SarathiConfig(scheduler="saratih")


@pytest.mark.parametrize("key", ["step_trace", "calibration_dir"])
@pytest.mark.parametrize("value", ["", "  ", 7, True, ["x"], "a\0b"])
def test_what_names_no_file_is_refused(key: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"--{key.replace('_', '-')} .*: must be the name of a file or folder"
    ):
        SarathiConfig(**{key: value})


def test_settings_survive_a_round_trip() -> None:
    config = SarathiConfig(token_budget=77)
    assert SarathiConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ('{"token-budget": 1}', "unknown key 'token-budget'; did you mean 'token_budget'?"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "sarathi.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config_file(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_the_carrier_looks_the_same_whatever_it_carries() -> None:
    one, other = (ConfigCarrier(SarathiConfig(token_budget=n)) for n in (64, 65))
    assert json.dumps({CONFIG_KEY: one}) == json.dumps({CONFIG_KEY: other})
    assert one.config != other.config


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy])
def test_the_carrier_is_copied_whole(through: Any) -> None:
    config = SarathiConfig(token_budget=64)
    additional = through({"other": 1, **config.engine_args()["additional_config"]})
    assert config_from_additional(additional) == config


@pytest.mark.parametrize(
    ("additional", "budget"),
    [
        ({}, None),
        (None, None),
        ({CONFIG_KEY: {"token_budget": 9}}, 9),
        ({CONFIG_KEY: SarathiConfig(token_budget=8)}, 8),
    ],
)
def test_settings_are_found_in_whatever_form(additional: Any, budget: int | None) -> None:
    assert config_from_additional(additional).token_budget == budget


def test_something_else_under_our_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a mapping of settings, not int"):
        config_from_additional({CONFIG_KEY: 3})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"token_budget": 512, "tbt_slo": "auto:25x"},
            "--tbt-slo auto:25x: has no effect with --token-budget 512.",
        ),
        (
            {"token_budget": 512, "prefill_max_wait_s": 5.0},
            "--prefill-max-wait-s 5.0: has no effect with --token-budget 512.",
        ),
        (
            {"token_budget": 512, "tbt_mode": "pace"},
            "--tbt-mode pace: has no effect with --token-budget 512.",
        ),
        (
            {"scheduler": "orca", "slo_classes": {"classes": {"a": {"ttft_slo_ms": 500}}}},
            "--slo-classes: has no effect with --scheduler orca.",
        ),
        ({"scheduler": "orca", "tbt_mode": "pace"}, "--tbt-mode pace: has no effect with --scheduler orca."),
        (
            {"tbt_slo_ms": 50.0, "tbt_slo": "auto:25x"},
            "--tbt-slo auto:25x: has no effect with --tbt-slo-ms 50;",
        ),
        ({"min_request_slo_ms": 20.0}, "--min-request-slo-ms 20: has no effect without --allow-request-slo."),
        (
            {"ttft_slo_ms": 500.0},
            "--ttft-slo-ms 500: has no effect without --prefill-order deadline.",
        ),
        (
            {"token_budget": 512, "allow_request_slo": True},
            "--allow-request-slo: has no effect with --token-budget 512.",
        ),
        (
            {"scheduler": "orca", "calibration_dir": "here"},
            "--calibration-dir here: has no effect with --scheduler orca.",
        ),
        (
            {"scheduler": "orca", "tbt_slo_ms": 30.0},
            "--tbt-slo-ms 30.0: has no effect with --scheduler orca.",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SarathiConfig(**values)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    "values",
    [
        {"token_budget": 512, "calibration_dir": "none"},
        {"token_budget": 512, "allow_request_slo": True, "prefill_order": "deadline", "ttft_slo_ms": 500.0},
    ],
)
def test_what_has_an_effect_is_taken(values: dict[str, Any]) -> None:
    assert SarathiConfig(**values).to_mapping().items() >= values.items()
