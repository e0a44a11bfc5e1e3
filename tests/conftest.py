"""Settings that vLLM reads from the environment when it is first imported, and the order of the tests."""

import os

import pytest

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
