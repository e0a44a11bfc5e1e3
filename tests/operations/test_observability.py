"""The dashboards and rules ask for what there is, both dashboards the same, and the rules fire when they should."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.operations.queries import (
    FOLDER,
    RULES,
    grafana_queries,
    keda_queries,
    metric_names,
    perses_queries,
    rules,
)
from vllm_sarathi.core.figures import FIGURES, PREFIX, Kind

SUFFIXES = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
SHOWN = {PREFIX + f.name + suffix: f for f in FIGURES.values() for suffix in SUFFIXES[f.kind]}


def all_queries() -> list[str]:
    boards = [
        q for board in (grafana_queries(), perses_queries()) for queries in board.values() for q in queries
    ]
    return [*boards, *keda_queries(), *(rule["expr"] for rule in rules())]


def test_every_query_asks_for_figures_that_there_are() -> None:
    for query in all_queries():
        assert metric_names(query) <= set(SHOWN), query
        assert metric_names(query) or "sarathi:" in query
        for counter in re.findall(r"(?:rate|increase)\((vllm_sarathi_\w+)", query):
            assert SHOWN[counter].kind is not Kind.GAUGE
        if "slo_class" in query:
            assert all(SHOWN[name].by_class for name in metric_names(query))


def test_every_figure_is_on_the_dashboards() -> None:
    asked = {SHOWN[name].name for qs in grafana_queries().values() for q in qs for name in metric_names(q)}
    # The SLO for the time to first token is in the ratio to it, and what waits of batch work in what waits by class.
    assert {*FIGURES} - asked == {"ttft_slo_seconds", "batch_waiting_requests"}


def test_both_dashboards_ask_the_same() -> None:
    assert grafana_queries() == perses_queries()
    assert len(grafana_queries()) >= 12


def test_what_is_told_of_an_slo_that_cannot_be_kept_is_told_by_class() -> None:
    asking = [query for query in all_queries() if "vllm_sarathi_slo_unattainable" in query]
    assert len(asking) == 3
    assert all("slo_class)" in query for query in asking)


def test_what_a_rule_records_is_what_the_alerts_use() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {
        name for rule in rules() if "alert" in rule for name in re.findall(r"sarathi:\w+:\w+", rule["expr"])
    }
    assert used == recorded


def test_the_compose_file_mounts_what_there_is_and_is_open_to_this_machine_alone() -> None:
    services = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not service["image"].endswith("latest")
        for mount in service["volumes"]:
            source, _, mode = mount.split(":")
            assert (FOLDER / source).exists()
            assert mode == "ro"


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    return path


def checked(promtool: str, *arguments: str) -> Any:
    return subprocess.run(
        [promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True, check=False
    )


def test_the_rules_fire_when_they_should_and_only_then(promtool: str) -> None:
    done = checked(promtool, "test", "rules", "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = (RULES.parent / "rules_test.yml").read_text()
    for rule in rules():
        if "alert" in rule:
            assert f"alertname: {rule['alert']}" in tested


def test_the_configuration_is_one(promtool: str) -> None:
    done = checked(promtool, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_is_wrong_is_found(promtool: str, tmp_path: Path) -> None:
    """The tests of the rules can fail."""
    for name in ("rules.yml", "rules_test.yml"):
        text = (RULES.parent / name).read_text()
        (tmp_path / name).write_text(text.replace("== 0", "== 1") if name == "rules.yml" else text)
    done = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode != 0
