"""Groups of a fleet's replicas in processes of their own, or as actors of a Ray cluster."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from vllm_sarathi.benchmark.common.farm import be_quiet, preloaded, ray_cluster
from vllm_sarathi.simulation.fleet.group import Group, Here, Line

END_S = 5.0


def _serve(connection: Connection) -> None:
    """Answer the calls of one group until the line is closed."""
    gc.disable()  # a collection would walk every live token list for nothing
    group = Group()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(group, method)(*arguments))
        except Exception as error:
            answer = (False, error)
        connection.send(answer)


class ProcessLine:
    """A group in a process of its own."""

    def __init__(self) -> None:
        context = preloaded()
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method of the group."""
        self._connection.send((method, arguments))

    def result(self) -> Any:
        """Return what it returned.

        Raises:
            RuntimeError: the process is gone.
        """
        try:
            worked, answer = self._connection.recv()
        except EOFError as error:
            raise RuntimeError(
                "a worker process of the fleet has ended, perhaps for lack of memory"
            ) from error
        if not worked:
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class RayLine:
    """A group as an actor of a cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._actor = ray.remote(Group).options(num_cpus=1).remote()
        self._pending: Any = None

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method of the group."""
        self._pending = getattr(self._actor, method).remote(*arguments)

    def result(self) -> Any:
        """Return what it returned."""
        return self._ray.get(self._pending)

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


@contextmanager
def open_lines(replicas: int, ray: str | None = None) -> Iterator[Sequence[Line]]:
    """Yield groups for the replicas: as many as there are cores here, or on a cluster.

    Args:
        replicas: how many there will be.
        ray: the address of a Ray cluster, `local` for one that is started here; None for processes of our own.

    Raises:
        ConfigError: Ray cannot be reached, or is not installed.
    """
    if ray is not None:
        with ray_cluster(ray) as cluster:
            cores = int(cluster.cluster_resources().get("CPU", 1))
            yield [RayLine(cluster) for _ in range(max(1, min(replicas, cores)))]
        return
    count = min(replicas, len(os.sched_getaffinity(0)))
    if count == 1:
        yield [Here()]
        return
    be_quiet()
    lines: list[ProcessLine] = []
    try:
        for _ in range(count):
            lines.append(ProcessLine())
        yield lines
    finally:
        for line in lines:
            line.close()
