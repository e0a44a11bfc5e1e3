"""The cheapest deployment that meets the SLOs: `vllm-sarathi plan`.

Candidates are tried by what they would cost at best. For each, the fewest replicas are searched that carry the load; a
candidate of which not even as many as the best so far would pay for are enough takes one run, and one whose bound says
so, none.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sarathi.benchmark.common.farm import Workers
from vllm_sarathi.benchmark.plan.bounds import Bound, bound
from vllm_sarathi.benchmark.plan.load import Hopeless, Load
from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.deployment import (
    build,
    check_some,
    deployment,
    enough_for,
    scheduler_choice,
)
from vllm_sarathi.simulation.devices.package import PRECISIONS
from vllm_sarathi.simulation.model_limits import limits_of
from vllm_sarathi.simulation.models import UnknownModel
from vllm_sarathi.simulation.quantization import NAMED_BYTES
from vllm_sarathi.simulation.simulator import Simulator

MOST_REPLICAS = 4096

MOST_TIMES = 4
"""The cost, as a multiple of the cheapest, above which a candidate is no runner-up."""

TENSOR_PARALLEL = (1, 2, 4, 8)
STAGES = (1, 2)
CHECKPOINT = "checkpoint"
SCHEDULERS = ("sarathi", "default@512", "default@2048")


@dataclass(frozen=True)
class Candidate:
    """A deployment of one replica, and its scheduler.

    Attributes:
        model, device: by name.
        tensor_parallel, stages, expert_parallel: how the model is spread.
        precision: of the weights; None for the checkpoint's own.
        scheduler: by name.
        skew: exponent of the power law that the experts' loads follow; None for what is usual where it runs.
    """

    model: str
    device: str
    tensor_parallel: int = 1
    stages: int = 1
    expert_parallel: bool = False
    precision: str | None = None
    scheduler: str = "sarathi"
    skew: float | None = None

    @property
    def devices(self) -> int:
        """Devices of a replica."""
        return self.tensor_parallel * self.stages

    @property
    def deployment(self) -> str:
        """The deployment's name."""
        pipeline = f"pp{self.stages}" if self.stages > 1 else ""
        spread = f"tp{self.tensor_parallel}{pipeline}{'ep' if self.expert_parallel else ''}"
        spread += "" if self.skew is None else f"skew{self.skew:g}"
        return f"{self.model}/{self.device}:{self.precision or ''}{spread}"


def candidates_of(
    model: str,
    devices: Iterable[str],
    schedulers: Sequence[str] = SCHEDULERS,
    most_devices: int = 8,
    precisions: Sequence[str | None] = (None,),
    experts: bool = False,
    skew: float | None = None,
) -> list[Candidate]:
    """Return all candidates.

    Args:
        model: by name.
        devices: by name.
        schedulers: by name.
        most_devices: of a replica.
        precisions: of the weights.
        experts: whether the model has any, which can be distributed whole.
        skew: as in Candidate.

    Raises:
        ConfigError: a skew of what a model without experts has none of, or one out of range.
    """
    if skew is not None and not experts:
        raise ConfigError(f"--skew {skew:g}: is of the loads of experts, and {model} has none.")
    if skew is not None and not 0 <= skew < 10:
        raise ConfigError(f"--skew {skew:g}: must be from 0, even loads, to below 10.")
    skew = None if skew is None else round(skew, 3)  # as a deployment's name can say it
    return [
        Candidate(model, device, ways, stages, whole, precision, scheduler, skew)
        for device in devices
        for stages in STAGES
        for ways in TENSOR_PARALLEL
        if ways * stages <= most_devices
        for whole in ((False, True) if experts and ways > 1 else (False,))
        for precision in precisions
        for scheduler in schedulers
    ]


@dataclass(frozen=True)
class ReplicaQuestion:
    """How many replicas of a candidate are enough, asked of a worker.

    Attributes:
        candidate: which.
        load: what is sent.
        least: replicas that the bound leaves.
        most: replicas above which it does not matter.
    """

    candidate: Candidate
    load: Load
    least: int
    most: int


@dataclass(frozen=True)
class Enough:
    """The answer.

    Attributes:
        replicas: the fewest that carry the load; None where as many as were asked for do not.
        runs: how many runs it took.
    """

    replicas: int | None
    runs: int


def settings_of(candidate: Candidate, load: Load) -> dict[str, Any]:
    """Return the settings of a candidate's scheduler: fixed budgets heed no SLO."""
    return dict(load.settings) if candidate.scheduler == "sarathi" else {}


def carries(candidate: Candidate, load: Load, replicas: int) -> bool:
    """Return whether a replica, one of `replicas`, carries its share of the load."""
    place = deployment(candidate.deployment, longest=load.longest)
    choice = scheduler_choice(candidate.scheduler, **settings_of(candidate, load))
    requests = load.at(load.rate_qps / replicas)
    simulator = Simulator(
        build(place, choice, load.share_prefixes, enough_tokens=enough_for(place, requests)),
        place.times(load.seed),
        requests,
        place.in_flight,
    )
    simulator.run(Hopeless(requests, load.attainment))
    return not simulator.given_up and load.kept(simulator.logs)


def enough(asked: ReplicaQuestion) -> Enough:
    """Return the fewest replicas that carry a load."""
    runs = 0

    def carried(replicas: int) -> bool:
        nonlocal runs
        runs += 1
        return carries(asked.candidate, asked.load, replicas)

    return Enough(fewest(carried, asked.least, asked.most), runs)


def fewest(carried: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the smallest number from `least` to `most` that is carried; None where `most` is not.

    Args:
        carried: supposed to be False below some number and True from it on.
        least, most: the range.
    """
    if least > most:
        return None
    bad, good, step = least - 1, None, 1
    if most < MOST_REPLICAS:  # somebody else is as good with more: most who are asked fail here
        if not carried(most):
            return None
        good = most
    while good is None:
        tried = min(bad + step, most)
        if carried(tried):
            good = tried
        elif tried == most:
            return None
        else:
            bad, step = tried, 2 * step
    while good - bad > 1:
        middle = (bad + good) // 2
        if carried(middle):
            good = middle
        else:
            bad = middle
    return good


@dataclass
class Verdict:
    """What became of a candidate.

    Attributes:
        candidate: which.
        bound: what was known before any run.
        least_cost: what it costs per hour at best.
        replicas: how many it takes; None where that was not found out.
        cost: of these, per hour.
        why: why it was left: `memory`, `slo`, `bound` (its best costs more), `dearer` (a run said so), `router` (its
            fleet does not carry what its replicas do); empty where its cost is known.
        runs: how many it took.
        place: of the candidate in the list of all: of two that cost the same, the first is taken.
    """

    candidate: Candidate
    bound: Bound
    least_cost: float = math.inf
    replicas: int | None = None
    cost: float = math.inf
    why: str = ""
    runs: int = 0
    place: int = 0


@dataclass
class Board:
    """What is known so far.

    Attributes:
        prices: of a device for an hour, by name.
        verdicts: of those that are decided.
        prune: whether those that cannot be among the first two are left; else all are searched to their end.
    """

    prices: Mapping[str, float]
    verdicts: list[Verdict] = field(default_factory=list)
    prune: bool = True

    def unit_cost(self, candidate: Candidate) -> float:
        """Return what one replica costs per hour."""
        return self.prices[candidate.device] * candidate.devices

    def carrying(self) -> list[Verdict]:
        """Return the verdicts whose cost is known, the cheapest first."""
        known = [verdict for verdict in self.verdicts if verdict.replicas is not None]
        return sorted(known, key=lambda v: (v.cost, v.candidate.devices, v.candidate.deployment, v.place))

    def ranked(self) -> list[Verdict]:
        """Return the cheapest verdict of each deployment, the cheapest first."""
        best: dict[str, Verdict] = {}
        for verdict in self.carrying():
            best.setdefault(verdict.candidate.deployment, verdict)
        return list(best.values())

    def most_replicas(self, candidate: Candidate) -> int:
        """Return the most replicas with which a candidate could still be the choice or the runner-up."""
        ranked = self.ranked()
        if not self.prune or not ranked:
            return MOST_REPLICAS
        first = ranked[0]
        if candidate.deployment == first.candidate.deployment:
            limit = first.cost
        else:
            limit = ranked[1].cost if len(ranked) > 1 else MOST_TIMES * first.cost
        # What costs the same changes nothing.
        return min(MOST_REPLICAS, math.ceil(limit / self.unit_cost(candidate) - 1e-9) - 1)


def search(
    candidates: Sequence[Candidate],
    load: Load,
    prices: Mapping[str, float],
    workers: Workers,
    prune: bool = True,
    note: Callable[[Verdict], None] = lambda verdict: None,
) -> Board:
    """Decide all candidates.

    Args:
        candidates: which.
        load: what is sent.
        prices: of a device for an hour, by name.
        workers: run it.
        prune: as `Board.prune`.
        note: told of each verdict.
    """
    board = Board(prices, prune=prune)
    bounds = _bounds(candidates, load, workers)
    open_ones = []
    for place, candidate in enumerate(candidates):
        verdict = Verdict(candidate, bounds[candidate.deployment], place=place)
        if verdict.bound.refused:
            verdict.why = verdict.bound.kind
            board.verdicts.append(verdict)
            note(verdict)
        else:
            verdict.least_cost = least_replicas(verdict.bound, load) * board.unit_cost(candidate)
            open_ones.append(verdict)
    open_ones.sort(key=lambda v: (v.least_cost, v.candidate.devices))
    pending: dict[Any, Verdict] = {}
    while open_ones or pending:
        while open_ones and len(pending) < workers.count:
            verdict = open_ones.pop(0)
            least = least_replicas(verdict.bound, load) if prune else 1
            most = board.most_replicas(verdict.candidate)
            if least > most:
                verdict.why = "bound"
                board.verdicts.append(verdict)
                note(verdict)
                continue
            pending[workers.submit(enough, ReplicaQuestion(verdict.candidate, load, least, most))] = verdict
        if pending:
            task = workers.any_of(pending)
            verdict = pending.pop(task)
            found: Enough = workers.output(task)
            verdict.replicas, verdict.runs = found.replicas, found.runs
            if found.replicas is None:
                verdict.why = "dearer"
            else:
                verdict.cost = found.replicas * board.unit_cost(verdict.candidate)
            board.verdicts.append(verdict)
            note(verdict)
    return board


def least_replicas(known: Bound, load: Load) -> int:
    """Return the replicas that a bound leaves."""
    return min(MOST_REPLICAS, max(1, math.ceil(load.rate_qps / known.most_qps - 1e-9)))


def _bounds(candidates: Sequence[Candidate], load: Load, workers: Workers) -> dict[str, Bound]:
    """Return the bound of each deployment."""
    names = list(dict.fromkeys(candidate.deployment for candidate in candidates))
    pending: dict[Any, str] = {}
    found: dict[str, Bound] = {}
    while names or pending:
        while names and len(pending) < workers.count:
            name = names.pop(0)
            pending[workers.submit(_bound, (name, load))] = name
        task = workers.any_of(pending)
        found[pending.pop(task)] = workers.output(task)
    return found


def _bound(asked: tuple[str, Load]) -> Bound:
    return bound(*asked)


def check_candidates(schedulers: Sequence[str], load: Load) -> None:
    """Check names before the first run.

    Raises:
        ConfigError: an unknown one, or none.
    """
    check_some(schedulers)
    for name in schedulers:
        scheduler_choice(name, **(dict(load.settings) if name == "sarathi" else {}))


def read_precisions(names: Sequence[str]) -> list[str | None]:
    """Return precisions of the weights by name; None is the checkpoint's own.

    Raises:
        ConfigError: an unknown one, or none.
    """
    known = (CHECKPOINT, *PRECISIONS)
    for name in names:
        if name not in known:
            raise ConfigError(f"--precisions {name!r}: unknown; {nearest_hint(name, known)}")
    if not names:
        raise ConfigError(f"--precisions: names none; known: {', '.join(known)}.")
    return [None if name == CHECKPOINT else name for name in names]


def has_experts(model: str, precisions: Sequence[str | None]) -> bool:
    """Return whether a model has experts, which can be distributed whole.

    Args:
        model: by name.
        precisions: of the weights, that are asked for.

    Raises:
        ConfigError: an unknown model; a config.json that is not understood; or a checkpoint that is quantized to
            another precision already.
    """
    try:
        limits = limits_of(model)
    except UnknownModel as error:
        said = (
            str(error)
            .replace("--deployment: unknown", "--model: unknown")
            .replace("FOLDER/DEVICE", "--model FOLDER")
        )
        raise ConfigError(said) from error
    for name in precisions:
        if name is not None and limits.weight_bytes not in (None, NAMED_BYTES[name]):
            raise ConfigError(
                f"--precisions {name}: {model} is quantized already, and vLLM does not quantize it again; leave it out."
            )
    return limits.experts
