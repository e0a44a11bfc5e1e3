"""Configurations shared by the tests of the engine: they need vLLM, but no weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.engine.vllm.internals import logger
from vllm_sarathi.testing.modelled import config_maker


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What our logger warns of; vLLM's handlers write to a stream that pytest does not see."""
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda message, *args: said.append(message % args))
    return said


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that describes a tiny Llama and holds no weights."""
    return config_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def make_config(model_folder: Path) -> Callable[..., Any]:
    """Return a function that gives a VllmConfig: stock without a SarathiConfig, ours with one."""
    return config_maker(model_folder)
