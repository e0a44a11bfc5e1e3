"""The model and the engines that the tests on the real engine share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.real.engines import Pair, open_pair
from vllm_sarathi.benchmark.live.reference_model import tiny_model

# Read when numba is first imported, for ngram drafts: more threads than one wait for each other on a busy core.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with its weights and a tokenizer of one token per byte."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tiny: Path) -> Iterator[Pair]:
    """Stock's engine and ours, with nothing special switched on."""
    with open_pair(tiny) as engines:
        yield engines
