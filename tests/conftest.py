"""Settings that vLLM reads from the environment when it is first imported, and the order of the tests."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# The tests' calibrations must not land among the user's; vLLM's own cache stays where it is, or each start is slow.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("VLLM_CACHE_ROOT", str(CACHE / "vllm"))
os.environ.setdefault("HF_HOME", str(CACHE / "huggingface"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sarathi-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # without it a busy core makes a step fifty times slower
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests last, so that what fails quickly is seen quickly."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
