"""Many independent searches, side by side on this machine's cores or as tasks of a Ray cluster: the same answers."""

import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_sarathi.core.config import ConfigError

Input = TypeVar("Input")
Output = TypeVar("Output")

PRELOAD = ["vllm_sarathi.engine.scheduler"]
"""Imported once by the server that the workers are forked from: vLLM takes seconds to import."""

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""What vLLM reads when it is first imported; a simulation needs neither threads nor memory for a model."""


KNOCK_S = 5.0


def be_quiet() -> None:
    """Set what vLLM reads, where the user has not."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})


def run_all(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    console: Console,
    ray: str | None = None,
    done: Callable[[int, Output], None] = lambda index, output: None,
) -> list[Output]:
    """Return `function` of each input, in their order, with a progress bar.

    Args:
        function: of a module, not a closure: other processes import it.
        inputs: what it is called with.
        console: where the bar goes.
        ray: the address of a Ray cluster, `local` for one that is started here; None for processes of our own.
        done: told of each output as it comes, with the place of its input.

    Raises:
        ConfigError: Ray cannot be reached, or is not installed.
    """
    be_quiet()
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outputs: dict[int, Output] = {}
    with (
        Progress(*columns, console=console, transient=True) as progress,
        open_workers(len(inputs), ray) as workers,
    ):
        bar = progress.add_task("searching", total=len(inputs))
        pending = {workers.submit(function, value): index for index, value in enumerate(inputs)}
        while pending:
            task = workers.any_of(pending)
            index = pending.pop(task)
            outputs[index] = workers.output(task)
            done(index, outputs[index])
            progress.advance(bar)
    return [outputs[index] for index in range(len(inputs))]


class Workers(Protocol):
    """What runs functions elsewhere.

    Attributes:
        count: how many run at once.
    """

    count: int

    def submit(self, function: Callable[[Input], Output], value: Input) -> Any:
        """Begin a function of a value, and return a task."""
        ...

    def any_of(self, tasks: Iterable[Any]) -> Any:
        """Wait for one of the tasks, and return it."""
        ...

    def output(self, task: Any) -> Any:
        """Return what the function of a finished task returned, or raise what it raised."""
        ...


@contextmanager
def open_workers(most: int, ray: str | None = None) -> Iterator[Workers]:
    """Yield workers on this machine's cores, or on a cluster.

    Args:
        most: the most tasks that there will be at once.
        ray: as `run_all` takes it.

    Raises:
        ConfigError: Ray cannot be reached, or is not installed.
    """
    be_quiet()
    if ray is not None:
        with ray_cluster(ray) as cluster:
            yield _RayWorkers(cluster)
        return
    workers = _ProcessWorkers(max(1, min(most, len(os.sched_getaffinity(0)))))
    try:
        yield workers
    except BaseException:
        workers.executor.shutdown(wait=False, cancel_futures=True)
        raise
    workers.executor.shutdown()


def preloaded() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes that have imported vLLM."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class _ProcessWorkers:
    def __init__(self, count: int) -> None:
        self.count = count
        self.executor = ProcessPoolExecutor(count, mp_context=preloaded())

    def submit(self, function: Callable[[Input], Output], value: Input) -> Future[Output]:
        return self.executor.submit(function, value)

    def any_of(self, tasks: Iterable[Future[Any]]) -> Future[Any]:
        return next(iter(wait(tasks, return_when=FIRST_COMPLETED).done))

    def output(self, task: Future[Output]) -> Output:
        return task.result()


class _RayWorkers:
    def __init__(self, ray: Any) -> None:
        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._ray = ray

    def submit(self, function: Callable[[Input], Output], value: Input) -> Any:
        return self._ray.remote(function).remote(value)

    def any_of(self, tasks: Iterable[Any]) -> Any:
        return self._ray.wait(list(tasks))[0][0]

    def output(self, task: Any) -> Any:
        return self._ray.get(task)


def _check_address(address: str | None) -> None:
    """Knock at a HOST:PORT: Ray itself would wait for minutes.

    Raises:
        ConfigError: nobody is there.
    """
    match = re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address or "")
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: no Ray cluster answers there ({error}).") from error


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Yield the module ray, connected to a cluster; see `run_all`."""
    # Imported here: only this way of running needs it.
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--ray {address}: Ray is not installed: pip install 'vllm-sarathi[ray]'."
        ) from error
    _check_address(address)
    try:
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False if address == "local" else None,
            runtime_env={"env_vars": QUIET},
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise ConfigError(f"--ray {address}: no Ray cluster answers there ({error}).") from error
    try:
        yield ray
    finally:
        ray.shutdown()
