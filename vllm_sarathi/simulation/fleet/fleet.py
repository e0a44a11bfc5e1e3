"""A fleet: requests in the order of their times, a router, and replicas that have run to just that time.

    next event = the earliest of: a request arrives, a prompt that was read elsewhere is handed on, a replica fails
                 or is added
    at it, every replica that the router looks at has run until its clock is there; then the router decides

A replica's clock may be past the event by a part of a step: an engine answers between two steps, too.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vllm_sarathi.simulation.fleet.group import Ended, Line, Look, ReplicaSpec, Sent
from vllm_sarathi.simulation.fleet.replica import Answer, Carried, Read
from vllm_sarathi.simulation.fleet.routers import Router, router
from vllm_sarathi.simulation.fleet.tally import Tally, tally
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

FLUSH_REQUESTS = 256
"""Requests in one message of a router that does not look at replicas."""


@dataclass(frozen=True, slots=True)
class Link:
    """What KV is sent over from a replica that reads prompts to one that generates.

    Attributes:
        bytes_per_s: of each sender's link; its transfers take turns.
        latency_s: of each transfer.
        token_bytes: KV of one token, over all devices of a replica.
    """

    bytes_per_s: float
    latency_s: float
    token_bytes: float

    def send_s(self, tokens: int) -> float:
        """Return the seconds that sending the KV cache of `tokens` takes."""
        return self.latency_s + tokens * self.token_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Change:
    """A replica that fails, or is added.

    Attributes:
        at_s: when.
        fails: which one; None adds one.
        role: of the one that is added, a key of Fleet.specs.
    """

    at_s: float
    fails: int | None = None
    role: str = ""


@dataclass(frozen=True)
class FleetSpec:
    """What a fleet is.

    Attributes:
        roles: the role of each replica: all of `serve`, or some of `prefill` and some of `decode`.
        specs: what a replica of each role is.
        router: by name; each of the two pools has one.
        kv_tokens: tokens in a replica's KV cache.
        link: between prefill and decode.
        changes: in the order of their times.
        reroute: whether the requests of a replica that fails are sent to others, which read again what it had; else
            they are lost.
        refresh_s: how often the router looks; it counts in between what it sends itself; 0 looks each time.
    """

    roles: tuple[str, ...]
    specs: dict[str, ReplicaSpec]
    router: str
    kv_tokens: int
    link: Link | None = None
    changes: tuple[Change, ...] = ()
    reroute: bool = True
    refresh_s: float = 0.0

    @property
    def most(self) -> int:
        """How many replicas there ever are."""
        return len(self.roles) + sum(change.fails is None for change in self.changes)


@dataclass
class Result:
    """What a run came to.

    Attributes:
        ended: each replica's figures.
        roles: of each replica, those that were added among them.
        unserved: the figures of the requests that ended outside of any replica: lost, or refused before they were read.
        rerouted: how often a request was sent to another replica because its own failed.
        unkept: requests of which every replica said that their SLO could not be met.
    """

    ended: list[Ended] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    unserved: dict[str, Tally] = field(default_factory=dict)
    rerouted: int = 0
    unkept: int = 0


@dataclass
class _Pool:
    """The replicas of one role.

    Attributes:
        router: chooses among them.
        alive: the replicas that are up.
        seen: what they last answered, and what was sent to them since.
        seen_s: when that was.
    """

    router: Router
    alive: list[int] = field(default_factory=list)
    seen: list[Answer] = field(default_factory=list)
    seen_s: float = float("-inf")


class Fleet:
    """One run of a fleet.

    Args:
        spec: what it is.
        lines: the groups that the replicas are spread over.
    """

    def __init__(self, spec: FleetSpec, lines: Sequence[Line]) -> None:
        self._spec = spec
        self._lines = lines
        self._buffers: list[list[Sent]] = [[] for _ in lines]
        self._busy = [False] * len(lines)
        self._pools = {role: _Pool(router(spec.router, spec.kv_tokens)) for role in spec.specs}
        self._first = "prefill" if "prefill" in spec.specs else "serve"
        self._read: list[tuple[float, int, Read]] = []
        self._counter = itertools.count()
        self._link_free_s: dict[int, float] = {}
        self._unserved: list[RequestLog] = []
        self._result = Result()
        for role in spec.roles:
            self._start(role)

    def run(self, requests: Sequence[SimulatedRequest]) -> Result:
        """Send requests, in the order of their arrival; return what they came to."""
        changes = list(self._spec.changes)
        for number, request in enumerate(requests):
            while changes and changes[0].at_s <= request.arrival_s:
                self._change(changes.pop(0))
            self._send(self._first, Carried(number, request), request.arrival_s)
        for change in changes:
            self._change(change)
        return self._end()

    def _start(self, role: str) -> None:
        index = len(self._result.roles)
        self._result.roles.append(role)
        self._call(self._line(index), "start", index, self._spec.specs[role], role)
        pool = self._pools[role]
        pool.alive.append(index)
        pool.seen_s = float("-inf")

    def _line(self, index: int) -> int:
        return index % len(self._lines)

    def _send(self, role: str, carried: Carried, now_s: float) -> None:
        """Route a request."""
        pool = self._pools[role]
        if role == "prefill" and pool.router.looks:  # else nobody minds when it is handed on
            self._hand_on(now_s)
        if not pool.alive:
            self._unserved.append(RequestLog(carried.request, carried.scheduled_s, list(carried.token_s)))
            return
        asked = carried.asked_at(now_s) if pool.router.asks else carried.request
        if pool.router.asks and carried.kv_s is not None:
            asked = replace(asked, prompt_tokens=1)  # all but its last token is read
        seen = self._see(pool, asked, now_s)
        if pool.router.asks and all(answer.kept is False for answer in seen):
            self._result.unkept += 1
        place = pool.router.choose(asked, seen)
        answer = seen[place]
        waiting_tokens = answer.waiting_tokens + carried.request.prompt_tokens
        seen[place] = answer._replace(waiting_tokens=waiting_tokens)
        buffer = self._buffers[self._line(answer.replica)]
        buffer.append(Sent(answer.replica, carried, now_s))
        if len(buffer) >= FLUSH_REQUESTS:
            self._advance(pool.alive, now_s, wait=False)

    def _see(self, pool: _Pool, request: SimulatedRequest, now_s: float) -> list[Answer]:
        """Return what the router sees."""
        if not pool.router.looks:
            if len(pool.seen) != len(pool.alive):
                pool.seen = [Answer(index, 0) for index in pool.alive]
        elif pool.router.asks or now_s >= pool.seen_s + self._spec.refresh_s:
            pool.seen = self._advance(pool.alive, now_s, request if pool.router.asks else None)
            pool.seen_s = now_s
        return pool.seen

    def _advance(
        self,
        replicas: Sequence[int],
        now_s: float,
        request: SimulatedRequest | None = None,
        wait: bool = True,
    ) -> list[Answer]:
        """Let replicas run until a time, and note the prompts that they have read; return their answers, in order."""
        asked: list[int] = []
        for line in range(len(self._lines)):
            mine = tuple(index for index in replicas if self._line(index) == line)
            if mine or self._buffers[line]:
                sent, self._buffers[line] = self._buffers[line], []
                self._begin(line, "turn", sent, Look(mine, now_s, request))
                asked.append(line)
        if not wait:
            return []
        answers = {answer.replica: answer for line in asked for answer in self._fetch(line)}
        return [answers[index] for index in replicas]

    def _fetch(self, line: int) -> list[Answer]:
        """Return what the last turn of a group came to, if it has not been fetched."""
        if not self._busy[line]:
            return []
        self._busy[line] = False
        answers, read = self._lines[line].result()
        self._note_read(read)
        found: list[Answer] = answers
        return found

    def _begin(self, line: int, method: str, *arguments: object) -> None:
        self._fetch(line)
        self._lines[line].begin(method, *arguments)
        self._busy[line] = method == "turn"

    def _call(self, line: int, method: str, *arguments: object) -> object:
        self._begin(line, method, *arguments)
        return self._lines[line].result()

    def _note_read(self, read: Sequence[Read]) -> None:
        for each in read:
            heapq.heappush(self._read, (each.at_s, next(self._counter), each))

    def _hand_on(self, now_s: float) -> None:
        """Route the prompts that have been read until a time to those who generate."""
        self._advance(self._pools["prefill"].alive, now_s)
        self._route_read(now_s)

    def _route_read(self, now_s: float) -> None:
        for read in self._read_until(now_s):
            carried, link = read.carried, self._spec.link
            if read.refused:
                self._unserved.append(RequestLog(carried.request, carried.scheduled_s, refused=True))
                continue
            assert link is not None, "two pools have a link"
            begun_s = max(read.at_s, self._link_free_s.get(read.replica, 0.0))
            tokens = carried.request.prompt_tokens + len(carried.token_s)
            self._link_free_s[read.replica] = here_s = begun_s + link.send_s(tokens)
            self._send("decode", replace(carried, kv_s=here_s), read.at_s)

    def _read_until(self, now_s: float) -> Iterator[Read]:
        while self._read and self._read[0][0] <= now_s:
            yield heapq.heappop(self._read)[2]

    def _catch_up(self, now_s: float) -> None:
        """Let every replica run until a time."""
        if "prefill" in self._pools:
            self._hand_on(now_s)
        for pool in self._pools.values():
            self._advance(pool.alive, now_s)

    def _change(self, change: Change) -> None:
        self._catch_up(change.at_s)
        if change.fails is None:
            self._start(change.role)
            return
        index, role = change.fails, self._result.roles[change.fails]
        pool = self._pools[role]
        pool.alive.remove(index)
        pool.seen, pool.seen_s = [], float("-inf")
        self._read = [entry for entry in self._read if entry[2].replica != index]
        heapq.heapify(self._read)
        unfinished = self._call(self._line(index), "fail", index, change.at_s)
        assert isinstance(unfinished, list)
        for carried in sorted(unfinished, key=lambda each: each.number):
            if self._spec.reroute:
                self._result.rerouted += 1
                self._send(self._first, carried, change.at_s)
            else:
                self._unserved.append(RequestLog(carried.request, carried.scheduled_s, list(carried.token_s)))

    def _end(self) -> Result:
        """Let all requests have their answers, and return the figures."""
        for pool in self._pools.values():  # those that read for others come first
            self._advance(pool.alive, 0.0)
            for line in range(len(self._lines)):
                self._begin(line, "drain", [i for i in pool.alive if self._line(i) == line])
            for each in self._lines:
                self._note_read(each.result())
            self._route_read(float("inf"))
        for line in range(len(self._lines)):
            self._begin(line, "end", [i for i in range(len(self._result.roles)) if self._line(i) == line])
        ended = [each for line in self._lines for each in line.result()]
        self._result.ended = sorted(ended, key=lambda each: each.replica)
        kinds = dict.fromkeys(log.request.kind for log in self._unserved)
        for kind in kinds:
            self._result.unserved[kind] = tally([log for log in self._unserved if log.request.kind == kind])
        return self._result
