"""Many independent searches, side by side on this machine's cores or as tasks of a Ray cluster: the same answers."""

import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_sarathi.core.config import ConfigError

Input = TypeVar("Input")
Output = TypeVar("Output")

PRELOAD = ["vllm_sarathi.engine.scheduler"]
"""Imported once by the server that the workers are forked from: vLLM takes seconds to import."""

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""What vLLM reads when it is first imported; a rehearsal needs neither threads nor memory for a model."""


KNOCK_S = 5.0


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
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("searching", total=len(inputs))

        def note(index: int, output: Output) -> None:
            done(index, output)
            progress.advance(bar)

        run = _by_processes if ray is None else _by_ray
        return run(function, inputs, note, ray)


def _by_processes(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    note: Callable[[int, Output], None],
    _: str | None,
) -> list[Output]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    outputs: dict[int, Output] = {}
    workers = max(1, min(len(inputs), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending: dict[Future[Output], int] = {
            pool.submit(function, value): index for index, value in enumerate(inputs)
        }
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    outputs[index] = future.result()
                    note(index, outputs[index])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [outputs[index] for index in range(len(inputs))]


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


def _by_ray(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    note: Callable[[int, Output], None],
    address: str | None,
) -> list[Output]:
    # Imported here: only this way of running needs it.
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("--ray: Ray is not installed: pip install ray.") from error
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
        remote: Any = ray.remote(function)
        pending = {remote.remote(value): index for index, value in enumerate(inputs)}
        outputs: dict[int, Output] = {}
        while pending:
            ready, _ = ray.wait(list(pending))
            index = pending.pop(ready[0])
            outputs[index] = ray.get(ready[0])
            note(index, outputs[index])
    finally:
        ray.shutdown()
    return [outputs[index] for index in range(len(inputs))]
