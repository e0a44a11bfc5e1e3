"""Replicas that share a process. Groups are driven from outside: here, in a process of their own, or on a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.disturbed import UNDISTURBED, Disturbance, disturbed
from vllm_sarathi.simulation.fleet.replica import Answer, Carried, Read, Replica, Role
from vllm_sarathi.simulation.fleet.tally import Tally, tally
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is, as plain values.

    Attributes:
        deployment, scheduler: by name.
        settings: those of SarathiConfig, for `sarathi`.
        share_prefixes: whether prefix caching is on.
        seed: of what scatters; each replica adds its index.
        calibration_dir: as `deployment` takes it.
        disturbance: what disturbs the device.
        longest: as `deployment` takes it.
    """

    deployment: str
    scheduler: str
    settings: tuple[tuple[str, Any], ...] = ()
    share_prefixes: bool = False
    seed: int = 0
    calibration_dir: str | None = None
    disturbance: Disturbance = UNDISTURBED
    longest: int | None = None

    def build(self, index: int, role: Role) -> Replica:
        """Return the replica."""
        place = deployment(self.deployment, self.calibration_dir, self.longest)
        scheduler = build(place, scheduler_choice(self.scheduler, **dict(self.settings)), self.share_prefixes)
        seed = self.seed + index
        times = disturbed(place.times(seed), self.disturbance, seed)
        return Replica(index, scheduler, times, place.in_flight, role)


class Sent(NamedTuple):
    """A request that a router has sent.

    Attributes:
        replica: to which.
        carried: the request.
        at_s: when.
    """

    replica: int
    carried: Carried
    at_s: float


class Look(NamedTuple):
    """What a router wants to see.

    Attributes:
        replicas: of which.
        at_s: when.
        request: whose first token it asks for; None asks for none.
    """

    replicas: tuple[int, ...]
    at_s: float
    request: SimulatedRequest | None = None


class Ended(NamedTuple):
    """What a replica came to.

    Attributes:
        replica: which.
        by_kind: the figures of the requests of each class.
    """

    replica: int
    by_kind: dict[str, Tally]


class Group:
    """Replicas that share a process."""

    def __init__(self) -> None:
        self._replicas: dict[int, Replica] = {}

    def start(self, index: int, spec: ReplicaSpec, role: Role) -> None:
        """Add a replica."""
        self._replicas[index] = spec.build(index, role)

    def turn(self, sent: Sequence[Sent], look: Look) -> tuple[list[Answer], list[Read]]:
        """Take in requests, and let replicas run until a time; return their answers, and the prompts that were read."""
        for each in sent:
            self._replicas[each.replica].send(each.carried, each.at_s)
        answers: list[Answer] = []
        read: list[Read] = []
        for index in look.replicas:
            replica = self._replicas[index]
            replica.advance(look.at_s)
            answers.append(replica.answer(look.at_s, look.request))
            if replica.prefill_only:
                read += replica.read()
        return answers, read

    def fail(self, index: int, at_s: float) -> list[Carried]:
        """Let a replica fail at a time that it has run to; return its requests that had no whole answer."""
        return self._replicas[index].fail(at_s)

    def end(self, indices: Sequence[int]) -> list[Ended]:
        """Let replicas answer all that they have, and return their figures; those that have failed have stopped."""
        ended = []
        for index in indices:
            logs = self.logs(index)
            kinds = dict.fromkeys(log.request.kind for log in logs.values())
            by_kind = {kind: [log for log in logs.values() if log.request.kind == kind] for kind in kinds}
            ended.append(Ended(index, {kind: tally(mine) for kind, mine in by_kind.items()}))
        return ended

    def drain(self, indices: Sequence[int]) -> list[Read]:
        """Let replicas answer all that they have; return the prompts that were read."""
        read: list[Read] = []
        for index in indices:
            self._replicas[index].drain()
            if self._replicas[index].prefill_only:
                read += self._replicas[index].read()
        return read

    def logs(self, index: int) -> dict[int, RequestLog]:
        """Return what a replica answered, by the requests' numbers; for its clients, or of the prompts that it read."""
        replica = self._replicas[index]
        return {log.carried.number: log if replica.prefill_only else log.client for log in replica.logs}


class Line(Protocol):
    """A group that is called from outside: `begin` sends a call, and `result` waits for what it returned."""

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method of the group; what an earlier call returned has been fetched."""
        ...

    def result(self) -> Any:
        """Return what the call returned, or raise what it raised."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Here:
    """A group in this process."""

    def __init__(self) -> None:
        self.group = Group()
        self._result: Any = None

    def begin(self, method: str, *arguments: Any) -> None:
        """Call a method of the group."""
        self._result = getattr(self.group, method)(*arguments)

    def result(self) -> Any:
        """Return what it returned."""
        return self._result

    def close(self) -> None:
        """Do nothing."""
