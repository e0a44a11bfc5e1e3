"""Settings that cannot be used are refused with their name, their value and what is valid."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolrs_plugin.core.config import AutoLRSConfig, ConfigError

GOOD: dict[str, Any] = {"max_steps": 100, "lr_range": (1e-5, 1.0)}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_steps", 0, "max_steps=0: must be a whole number of at least 1"),
        ("max_steps", -5, "max_steps=-5: must be a whole number of at least 1"),
        ("max_steps", 10.0, "max_steps=10.0: must be a whole number"),
        ("max_steps", True, "max_steps=True: must be a whole number"),
        ("max_steps", "100", "max_steps='100': must be a whole number"),
        ("lr_range", (1.0, 1e-5), r"lr_range=\(1.0, 1e-05\): is reversed"),
        ("lr_range", (0.1, 0.1), r"lr_range=\(0.1, 0.1\): is empty"),
        ("lr_range", (), r"lr_range=\(\): .* two finite numbers"),
        ("lr_range", (0.1,), "two finite numbers"),
        ("lr_range", (1, 2, 3), "two finite numbers"),
        ("lr_range", (0.0, 1.0), r"lr_range=\(0.0, 1.0\): must be \(low, high\) with 0 < low < high"),
        ("lr_range", (-1.0, 1.0), "0 < low < high"),
        ("lr_range", (1e-5, math.inf), "two finite numbers"),
        ("lr_range", (math.nan, 1.0), "two finite numbers"),
        ("lr_range", ("a", "b"), "two finite numbers"),
        ("lr_range", 0.1, "two finite numbers"),
        ("lr_range", None, "two finite numbers"),
        ("lr_range", (0.1, 1e7), "high <= 1e"),
        ("search_budget", 0, "search_budget=0: must be a fraction of max_steps, above 0 and at most 1"),
        ("search_budget", -0.1, "search_budget=-0.1"),
        ("search_budget", 1.01, "search_budget=1.01"),
        ("search_budget", 25, "search_budget=25"),
        ("search_budget", math.nan, "search_budget=nan"),
        ("search_budget", True, "search_budget=True"),
        ("search_budget", "0.25", "search_budget='0.25'"),
        ("mode", "fast", "mode='fast': unknown; valid: staged, once, paper, find"),
        ("seed", -1, "seed=-1: must be a whole number of at least 0"),
        ("seed", None, "seed=None"),
        ("warmup", 0.6, "warmup=0.6: must be a fraction of max_steps from 0 to 0.5"),
        ("warmup", -0.1, "warmup=-0.1"),
        ("final_decay", 1, "final_decay=1: must be True or False"),
        ("validation", "yes", "validation='yes': must be True or False"),
        ("eval_cost_steps", -1, "eval_cost_steps=-1: must be a number of at least 0"),
        ("eval_cost_steps", math.inf, "eval_cost_steps=inf"),
        ("prior_lr", -1e-3, "prior_lr=-0.001: must be a learning rate, or None"),
        ("prior_lr", math.nan, "prior_lr=nan"),
        ("prior_lr", "adam", "prior_lr='adam'"),
        ("greater_is_better", 1, "greater_is_better=1: must be True or False"),
        ("warm_start", (), r"warm_start=\(\): must be \(progress, learning rate\) pairs from progress 0 on"),
        ("warm_start", ((0.5, 0.1),), "from progress 0 on"),
        ("warm_start", ((0.0, 0.1), (0.0, 0.2)), "rising"),
        ("warm_start", ((0.0, 0.0),), "each rate above 0"),
        ("warm_start", (0.0, 0.1), "pairs"),
        ("evaluations", 0, "evaluations=0: must be a whole number of at least 1"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AutoLRSConfig(**{**GOOD, key: value})


def test_an_unknown_or_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"AutoLRS: unknown setting 'max_step'; did you mean 'max_steps'\?"):
        AutoLRSConfig.from_mapping({**GOOD, "max_step": 3}, origin="AutoLRS")
    with pytest.raises(ConfigError, match="unknown setting 'zzz'; valid: max_steps, lr_range"):
        AutoLRSConfig.from_mapping({**GOOD, "zzz": 3})
    for key in GOOD:
        with pytest.raises(ConfigError, match=f"AutoLRSConfig: the setting '{key}' is missing"):
            AutoLRSConfig.from_mapping({k: v for k, v in GOOD.items() if k != key})


@given(
    low=st.floats(1e-12, 1e-3),
    factor=st.floats(1.001, 1e6),
    budget=st.floats(1e-9, 1.0),
    seed=st.integers(0, 2**40),
)
def test_settings_survive_json(low: float, factor: float, budget: float, seed: int) -> None:
    config = AutoLRSConfig(max_steps=7, lr_range=(low, low * factor), search_budget=budget, seed=seed)
    assert AutoLRSConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


def test_settings_cannot_be_changed() -> None:
    config = AutoLRSConfig(**GOOD)
    with pytest.raises(AttributeError):
        config.max_steps = 3  # type: ignore[misc]
    assert AutoLRSConfig(max_steps=100, lr_range=[1e-5, 1]).lr_range == (1e-5, 1.0)  # type: ignore[arg-type]
