"""Probes in parallel on Ray actors that hold replicas of a job.

The state that they start from travels through Ray's object store as the bytes of one safetensors file; a probe and its
result are plain numbers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from autolrs_plugin.core.actions import Probe, Result
from autolrs_plugin.core.journal import action_from_mapping, action_to_mapping
from autolrs_plugin.training.job import Job
from autolrs_plugin.training.replica import BuildJob, Replica
from autolrs_plugin.training.signals import SIGNALS

logger = logging.getLogger("autolrs_plugin")

LOOK_S = 1.0
"""How often to look whether this process is asked for something else, while actors probe."""


class RayProbes:
    """Carries out probes in parallel on Ray actors: `AutoLRS(..., probes=RayProbes(build), parallel_probes=2)`.

    What a probe gives does not depend on where it runs, given equal processors and threads, so neither does the search:
    the number of actors changes how long it takes, `parallel_probes` what it asks for. If an actor dies, another one
    repeats its probe. Without any actor, probes run in this process.

    Args:
        build: returns what AutoLRS takes of a job, as keyword arguments: `model`, `optimizer`, `train_step`, and
            whichever of `validate`, `train_data`, `probe_data`, `data`, `scaler`, `scheduler`, `stateful`, `generators`
            and `count_tokens` the run has. Called once on each actor; use it for the run itself as well.
        actors: how many replicas to hold.
        cpus: CPUs of each actor; also the number of its threads.
        gpus: GPUs of each actor.
        ready_timeout_s: actors that are not ready after this time are given up, seconds.

    Raises:
        TypeError: `build` cannot be called.
        ValueError: `actors` is less than 1.
    """

    def __init__(
        self,
        build: BuildJob,
        *,
        actors: int = 2,
        cpus: float = 1,
        gpus: float = 0,
        ready_timeout_s: float = 120.0,
    ) -> None:
        if not callable(build):
            raise TypeError(f"build: a {type(build).__name__} cannot be called; it must return the job.")
        if actors < 1:
            raise ValueError(f"actors={actors!r}: must be at least 1.")
        self._build, self._wanted, self._ready_timeout_s = build, actors, ready_timeout_s
        self._needs = {"CPU": float(cpus), "GPU": float(gpus)}
        self._actors: list[Any] | None = None
        self._running: dict[Any, tuple[Probe | None, Any]] = {}
        self._done: dict[Probe, Result] = {}
        self._kept_state: Callable[[], bytes] | None = None
        self._state: Any = None
        self._states = 0

    @property
    def actors(self) -> tuple[Any, ...]:
        """The actors that are there; those that died are not."""
        return tuple(self._actors or ())

    def attach(self, kept_state: Callable[[], bytes]) -> None:
        """Take note of what returns the state that every probe starts from."""
        self._kept_state = kept_state

    def start(self) -> None:
        """Have the actors build their jobs, and wait until they have; otherwise that happens at the first probe.

        Raises:
            Exception: whatever `build` raised.
        """
        if self._actors is not None:
            return
        new = [self._new_actor() for _ in range(min(self._wanted, self._room()))]
        built = {actor.build.remote(): actor for actor in new}
        ready: list[Any] = []
        late = list(built)
        if built:
            ready, late = ray.wait(late, num_returns=len(late), timeout=self._ready_timeout_s)
        for reference in late:
            ray.kill(built[reference])
        self._actors = [built[reference] for reference in ready]
        for reference in ready:
            try:
                ray.get(reference)
            except RayActorError as error:
                self._lose(built[reference], error)
        if len(self._actors) < self._wanted:
            rest = "in parallel on those" if self._actors else "one after the other in this process"
            found = f"{len(self._actors)} of {self._wanted} actors could be had"
            logger.warning("probes: %s; probing %s.", found, rest)

    def probe(self, ahead: Sequence[Probe], seed: int) -> Result | None:
        """Return the result of the first of `ahead`, and begin as many of the others as there are actors for.

        After a signal that somebody handles, one that was stopped is returned, and the results of those that
        were begun are ignored.

        Raises:
            Exception: whatever the job's own functions raised.
        """
        self.start()
        while ahead[0] not in self._done:
            self._assign(ahead, seed)
            if not self._running:
                return None
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=LOOK_S)
            if SIGNALS.asked:
                return Result(stopped=True)
            if not ready:
                continue
            probe, actor = self._running.pop(ready[0])
            try:
                values = ray.get(ready[0])
                if probe is not None:
                    self._done[probe] = Result(**{**values, "losses": tuple(values["losses"])})
            except RayActorError as error:
                self._lose(actor, error)
        return self._done.pop(ahead[0])

    def forget(self) -> None:
        """Send another state with the next probe; what probes from the one before give is of no use."""
        self._state = None
        self._done.clear()
        self._running = {reference: (None, actor) for reference, (_, actor) in self._running.items()}

    def close(self) -> None:
        """Let go of the actors."""
        for actor in self._actors or ():
            ray.kill(actor)
        self._actors, self._state = [], None
        self._running.clear()

    def _room(self) -> int:
        """Return how many actors the cluster has room for, when nobody else is there."""
        if not ray.is_initialized():
            ray.init()
        # What is free at the moment lags behind; whoever waits for it in vain is given up by the time limit.
        there: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        rooms = [there.get(kind, 0.0) // need for kind, need in self._needs.items() if need]
        return int(min(rooms, default=self._wanted))

    def _new_actor(self) -> Any:
        cpus, gpus = self._needs.values()
        return _Actor.options(num_cpus=cpus, num_gpus=gpus).remote(self._build, max(1, int(cpus)))  # type: ignore[attr-defined]

    def _assign(self, ahead: Sequence[Probe], seed: int) -> None:
        busy = [actor for _, actor in self._running.values()]
        idle = [actor for actor in self.actors if actor not in busy]
        begun = [*self._done, *(probe for probe, _ in self._running.values())]
        for probe, actor in zip([p for p in ahead if p not in begun], idle, strict=False):
            if self._state is None:
                assert self._kept_state is not None, "a probe without a job"
                self._state = ray.put(np.frombuffer(self._kept_state(), dtype=np.uint8))
                self._states += 1
            reference = actor.probe.remote(self._states, self._state, action_to_mapping(probe), seed)
            self._running[reference] = probe, actor

    def _lose(self, actor: Any, error: Exception) -> None:
        assert self._actors is not None
        self._actors.remove(actor)
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            "probes: an actor died (%s); %d are left, and repeat its probe.", reason, len(self._actors)
        )


@ray.remote
class _Actor:
    """An actor that holds a replica."""

    def __init__(self, build: BuildJob, threads: int) -> None:
        torch.set_num_threads(threads)
        self._build = build
        self._state = 0

    def build(self) -> None:
        """Build the job; not at construction, where an error of the user's would look like a lost actor."""
        self._replica = Replica(Job.of(**self._build()))

    def probe(self, number: int, state: Any, probe: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the result of a probe from `state` (uint8, shape [bytes]), the same one for the same number."""
        if number != self._state:
            self._replica.receive(state.tobytes())
            self._state = number
        action = action_from_mapping(probe)
        assert isinstance(action, Probe)
        return asdict(self._replica.probe(action, seed))
