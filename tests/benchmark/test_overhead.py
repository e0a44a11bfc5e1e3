"""The overhead benchmark: that it measures what it says, never how long that took."""

import json

import pytest

from vllm_sarathi.benchmark.profile.overhead import measure_overhead
from vllm_sarathi.core.config import SarathiConfig

pytest.importorskip("vllm")


@pytest.mark.parametrize("config", [SarathiConfig(token_budget=512), SarathiConfig(tbt_slo_ms=50)])
def test_the_overhead_is_measured_on_the_scene_it_names(config: SarathiConfig) -> None:
    result = json.loads(measure_overhead(config, running=8, waiting=2, steps=5).to_json())
    assert set(result) == {"schema", "running", "waiting", "parent_us", "ours_us", "ratio"}
    assert (result["schema"], result["running"], result["waiting"]) == (1, 8, 2)
    assert result["ours_us"] > 0
    assert result["parent_us"] > 0
    assert result["ratio"] == pytest.approx(result["ours_us"] / result["parent_us"])
