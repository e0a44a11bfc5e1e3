"""vLLM's own chart with our values, judged by Helm's own linter: its schema, and its templates as they come out.

The chart is not ours to carry: VLLM_CHART names its folder (chart-helm in the examples of vLLM's source distribution).
"""

import asyncio
import os
import shutil
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip("helm_sdkpy", reason="pip install helm-sdkpy (from Python 3.12 on)")
CHART = os.environ.get("VLLM_CHART")
pytestmark = pytest.mark.skipif(CHART is None, reason="VLLM_CHART names no folder")

VALUES = Path(__file__).parents[2] / "examples" / "deploy" / "values.yaml"


class Severity(IntEnum):
    """As Helm's linter has it."""

    INFO = 1
    WARNING = 2
    ERROR = 3


def merged(chart: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chart's values with ours over them, as `helm -f` merges them."""
    both = {**chart, **ours}
    for key in chart.keys() & ours.keys():
        if isinstance(chart[key], dict) and isinstance(ours[key], dict):
            both[key] = merged(chart[key], ours[key])
    return both


def lint(folder: Path, ours: Mapping[str, Any]) -> list[tuple[Severity, str]]:
    """Return what the linter says of the chart with such values, and of which file."""
    shutil.copytree(str(CHART), folder)
    chart = yaml.safe_load((folder / "values.yaml").read_text())
    (folder / "values.yaml").write_text(yaml.safe_dump(merged(chart, ours)))
    said = asyncio.run(helm.Lint(helm.Configuration()).run(str(folder)))
    assert said["TotalChartsLinted"] == 1
    return [(Severity(each["Severity"]), each["Path"]) for each in said["Messages"]]


def test_the_chart_with_our_values_is_without_a_warning(tmp_path: Path) -> None:
    said = lint(tmp_path / "chart", yaml.safe_load(VALUES.read_text()))
    assert [each for each in said if each[0] >= Severity.WARNING] == []


def test_it_would_find_a_value_that_the_chart_does_not_take(tmp_path: Path) -> None:
    values = yaml.safe_load(VALUES.read_text())
    values["readinessProbe"]["failureThreshold"] = "many"
    assert (Severity.ERROR, "values.yaml") in lint(tmp_path / "chart", values)
