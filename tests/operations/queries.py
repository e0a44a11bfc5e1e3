"""Every query in the dashboards, the rules and the autoscaler of `examples/observability`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "observability"
GRAFANA = FOLDER / "grafana" / "dashboards" / "vllm-sarathi.json"
PERSES = FOLDER / "perses" / "vllm-sarathi.json"
RULES = FOLDER / "prometheus" / "rules.yml"
KEDA = FOLDER / "keda" / "scaled-object.yaml"


def grafana_queries() -> dict[str, list[str]]:
    """Return the queries of each panel, by its title."""
    panels = json.loads(GRAFANA.read_text())["panels"]
    return {p["title"]: [t["expr"] for t in p["targets"]] for p in panels if "targets" in p}


def perses_queries() -> dict[str, list[str]]:
    """Return the queries of each panel, by its title."""
    panels = json.loads(PERSES.read_text())["spec"]["panels"].values()
    return {
        p["spec"]["display"]["name"]: [q["spec"]["plugin"]["spec"]["query"] for q in p["spec"]["queries"]]
        for p in panels
    }


def rules() -> Iterator[dict[str, Any]]:
    """Yield the recording and alert rules."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


def keda_queries() -> list[str]:
    """Return the queries of the autoscaler."""
    triggers = yaml.safe_load(KEDA.read_text())["spec"]["triggers"]
    return [trigger["metadata"]["query"] for trigger in triggers]


def metric_names(query: str) -> set[str]:
    """Return the names of our metrics in a query."""
    return set(re.findall(r"\bvllm_sarathi_\w+", query))
