"""Side by side: the same answers from this machine's cores, from Ray, and from one process."""

import sys

import pytest
from rich.console import Console

from vllm_sarathi.benchmark.capacity.search import Criterion, RequestSource, Task, find
from vllm_sarathi.benchmark.common.farm import run_all
from vllm_sarathi.core.config import ConfigError

TASKS = [
    Task("mistral-7b/a100", name, RequestSource("uniform", 4), Criterion(60.0))
    for name in ("sarathi@512", "prefill-first")
]


def half(number: int) -> float:
    """A function that other processes can import."""
    if number < 0:
        raise ConfigError(f"{number}: below zero")
    return number / 2


def console() -> Console:
    return Console(record=True, width=100)


def test_outputs_come_in_the_order_of_inputs_and_are_told_as_they_come() -> None:
    told: dict[int, float] = {}
    outputs = run_all(half, [6, 2, 4], console(), done=lambda index, output: told.update({index: output}))
    assert outputs == [3.0, 1.0, 2.0]
    assert told == {0: 3.0, 1: 1.0, 2: 2.0}
    assert run_all(half, [], console()) == []


def test_an_error_of_a_worker_comes_back_as_it_is() -> None:
    with pytest.raises(ConfigError, match="-1: below zero"):
        run_all(half, [2, -1, 4], console())


def test_a_cluster_that_is_not_there_is_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"--ray 127\.0\.0\.1:1: "):
        run_all(half, [2], console(), ray="127.0.0.1:1")


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray local: .* pip install 'vllm-sarathi\[ray\]'"):
        run_all(half, [2], console(), ray="local")


@pytest.mark.slow
def test_processes_and_ray_find_what_one_process_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    alone = [find(task) for task in TASKS]
    assert len({found.qps for found in alone}) > 1
    assert run_all(find, TASKS, console()) == alone
    start = ray.init

    def small(**options: object) -> object:
        return start(**options, num_cpus=2, object_store_memory=200 * 2**20)

    monkeypatch.setattr(ray, "init", small)
    assert run_all(find, TASKS, console(), ray="local") == alone
    assert not ray.is_initialized()
