"""The metrics of a server: counters, gauges and histograms of the SLOs, by class, from finished steps.

They follow Prometheus' conventions: base units (seconds, tokens), and counters end in `_total`. Latencies are ratios to
their SLO: 1 is the SLO itself, so one dashboard and one alert serve every SLO, and the buckets up to 1 count what was
kept.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from vllm_sarathi.core.types import ONE_STAGE, Pipeline

if TYPE_CHECKING:  # it brings numpy, and the plugin reads the names here in processes that must start quickly
    from vllm_sarathi.core.step_trace import TracedStep

PREFIX = "vllm_sarathi_"

DEFAULT_CLASS = "default"
"""The class of a request that is of no other."""

SLO_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Bounds for what was measured over its SLO."""

PREDICTION_RATIOS = (0.5, 0.75, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0)
"""Bounds for what was measured over what was predicted."""


class Kind(StrEnum):
    """What a figure is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Figure:
    """One figure, as it is declared to Prometheus.

    Attributes:
        name: without the prefix, and for a counter without `_total`.
        kind: what it is.
        help: what it tells.
        by_class: whether it has a value for each class of requests.
        bounds: the upper bounds of a histogram's buckets, the infinite one left out.
    """

    name: str
    kind: Kind
    help: str
    by_class: bool = False
    bounds: tuple[float, ...] = ()


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("steps", Kind.COUNTER, "Steps completed."),
        Figure("prefill_tokens", Kind.COUNTER, "Prompt tokens that were prefilled."),
        Figure("batch_prefill_tokens", Kind.COUNTER, "Prompt tokens of batch work that were prefilled."),
        Figure("gaps", Kind.COUNTER, "Gaps between tokens of requests with an SLO.", True),
        Figure("gaps_kept", Kind.COUNTER, "Gaps between tokens that met their SLO.", True),
        Figure("first_tokens", Kind.COUNTER, "First tokens of requests with an SLO.", True),
        Figure("first_tokens_kept", Kind.COUNTER, "First tokens that met their SLO.", True),
        Figure(
            "relegated_requests",
            Kind.COUNTER,
            "Requests put behind others: their SLO could not be met.",
            True,
        ),
        Figure("refused_requests", Kind.COUNTER, "Requests refused: their SLO could not be met.", True),
        Figure("step_predicted_seconds", Kind.COUNTER, "Predicted time of the steps with a prediction."),
        Figure("step_measured_seconds", Kind.COUNTER, "Measured time of the steps with a prediction."),
        Figure("faults", Kind.COUNTER, "Errors of the plugin; each leaves one step to stock scheduling."),
        Figure("tbt_slo_seconds", Kind.GAUGE, "SLO for the time between tokens."),
        Figure("ttft_slo_seconds", Kind.GAUGE, "SLO for the time to first token."),
        Figure("slo_unattainable", Kind.GAUGE, "1 if decodes alone take longer than the SLO.", True),
        Figure("decode_step_seconds", Kind.GAUGE, "Median time of a step of decodes alone."),
        Figure("token_budget", Kind.GAUGE, "Median token budget of hybrid steps."),
        Figure(
            "prediction_error_ratio",
            Kind.GAUGE,
            "Median relative error of the predicted times of hybrid steps.",
        ),
        Figure("running_requests", Kind.GAUGE, "Running requests."),
        Figure("waiting_requests", Kind.GAUGE, "Requests waiting to be admitted.", True),
        Figure("batch_waiting_requests", Kind.GAUGE, "Waiting requests that are batch work."),
        Figure(
            "headroom_tokens_per_second",
            Kind.GAUGE,
            "Prompt tokens per second that could be prefilled within the SLOs on top of the present load; batch work "
            "counts as free capacity.",
        ),
        Figure(
            "time_between_tokens_slo_ratio",
            Kind.HISTOGRAM,
            "Time between tokens over its SLO.",
            True,
            SLO_RATIOS,
        ),
        Figure(
            "time_to_first_token_slo_ratio",
            Kind.HISTOGRAM,
            "Time to first token over its SLO.",
            True,
            SLO_RATIOS,
        ),
        Figure(
            "step_prediction_ratio",
            Kind.HISTOGRAM,
            "Measured over predicted time of hybrid steps.",
            bounds=PREDICTION_RATIOS,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ClassGaps:
    """The gaps between tokens that a step ended, of one class of requests.

    Attributes:
        slo_class: the class.
        decodes: how many gaps.
        slo_s: how long the step was allowed to take for them, seconds; None where there is no SLO.
    """

    slo_class: str
    decodes: int
    slo_s: float | None


@dataclass(frozen=True, slots=True)
class TokenWait:
    """How long a client waited for a token that its stream did not bring from one step to the next.

    Attributes:
        slo_class: its request's class.
        taken_s: for a first token since the request arrived; after a preemption since the token before it; seconds.
        slo_s: how long it was allowed to take, seconds; None where there is no SLO.
    """

    slo_class: str
    taken_s: float
    slo_s: float | None


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step, with the gaps and first tokens that it ended, by class.

    Attributes:
        traced: the step.
        gaps: the gaps of its own length that it ended, by class.
        first_tokens: the first tokens that it brought.
        resumed: the gaps that it ended of streams that were preempted, and have their prompt prefilled again.
        batch_tokens: its prompt tokens of batch work.
    """

    traced: "TracedStep"
    gaps: tuple[ClassGaps, ...]
    first_tokens: tuple[TokenWait, ...] = ()
    resumed: tuple[TokenWait, ...] = ()
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KeptGaps:
    """How many gaps of a class ended under an SLO, and how many of them kept it.

    Attributes:
        slo_class: the class.
        slo_s: the SLO for the time between tokens, seconds; None where its requests had several.
        gaps, kept: all of them, and those within the SLO.
    """

    slo_class: str
    slo_s: float | None
    gaps: int
    kept: int


def kept_gaps(steps: Sequence[FinishedStep], pipeline: Pipeline = ONE_STAGE) -> list[KeptGaps]:
    """Return how the SLOs of each class were kept, by the name of the class; `pipeline` is the stages of the device."""
    found: dict[str, list[tuple[float, int, bool]]] = {}
    for step in steps:
        for each in step.gaps:
            if each.slo_s is not None and each.decodes:
                kept, slo_s = step.traced.measured_s <= each.slo_s, pipeline.token_s(each.slo_s)
                found.setdefault(each.slo_class, []).append((slo_s, each.decodes, kept))
        for wait in step.resumed:
            if wait.slo_s is not None:
                # The way of the others, so that one SLO is one number here.
                slo_s = pipeline.token_s(pipeline.step_s(wait.slo_s))
                found.setdefault(wait.slo_class, []).append((slo_s, 1, wait.taken_s <= wait.slo_s))
    return [
        KeptGaps(
            name,
            own[0][0] if len({slo_s for slo_s, _, _ in own}) == 1 else None,
            sum(count for _, count, _ in own),
            sum(count for _, count, kept in own if kept),
        )
        for name, own in sorted(found.items())
    ]


@dataclass(frozen=True, slots=True)
class Queues:
    """The requests that run and wait at a moment.

    Attributes:
        running: requests that run.
        waiting: requests that wait to be let in, by class.
    """

    running: int
    waiting: Mapping[str, int]

    @property
    def total_waiting(self) -> int:
        """Those of all classes."""
        return sum(self.waiting.values())


@dataclass(slots=True)
class _Buckets:
    """A histogram: how many values fell between each two bounds, and their sum."""

    counts: list[float]
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a figure.

    Attributes:
        figure: whose it is.
        suffix: what follows the figure's name: `_total`, `_bucket`, `_sum` or nothing.
        labels: beside the engine's rank.
        value: the number; of a bucket, what fell into it alone.
    """

    figure: Figure
    suffix: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass
class Figures:
    """Sums up finished steps.

    Args:
        classes: the names of the classes that the server has.
        batch: those of them that are batch work.

    Attributes:
        counters, gauges: by the figure's name and the class; the class is empty where there is none.
    """

    classes: InitVar[Sequence[str]] = (DEFAULT_CLASS,)
    batch: Collection[str] = ()

    counters: dict[tuple[str, str], float] = field(default_factory=dict)
    gauges: dict[tuple[str, str], float] = field(default_factory=dict)
    _histograms: dict[tuple[str, str], _Buckets] = field(default_factory=dict)

    def __post_init__(self, classes: Sequence[str]) -> None:
        for figure in FIGURES.values():  # so that a rate over a scrape before the first event is a rate
            if figure.kind is Kind.COUNTER:
                for name in classes if figure.by_class else ("",):
                    self.count(figure.name, name, 0.0)
        for name in classes:  # nobody waits, which is not the same as unknown
            self.set("waiting_requests", 0.0, name)

    def count(self, name: str, slo_class: str = "", amount: float = 1.0) -> None:
        """Raise a counter."""
        assert FIGURES[name].kind is Kind.COUNTER
        assert FIGURES[name].by_class == bool(slo_class)
        self.counters[name, slo_class] = self.counters.get((name, slo_class), 0.0) + amount

    def set(self, name: str, value: float | None, slo_class: str = "") -> None:
        """Set a gauge; None, or what is not finite, takes it away."""
        assert FIGURES[name].kind is Kind.GAUGE
        if value is None or not math.isfinite(value):
            self.gauges.pop((name, slo_class), None)
        else:
            self.gauges[name, slo_class] = float(value)

    def take(self, steps: Sequence[FinishedStep]) -> None:
        """Take in finished steps, oldest first."""
        if not steps:
            return
        self.count("steps", amount=len(steps))
        shapes = [step.traced.shape for step in steps]
        self.count("prefill_tokens", amount=sum(s.tokens - s.decodes for s in shapes if s.prefill_work > 0))
        self.count("batch_prefill_tokens", amount=sum(step.batch_tokens for step in steps))
        gaps = [(g, step.traced.measured_s) for step in steps for g in step.gaps if g.decodes]
        ratios = [(g.slo_class, s / g.slo_s, g.decodes) for g, s in gaps if g.slo_s is not None]
        ratios += _wait_ratios(wait for step in steps for wait in step.resumed)
        self._take_ratios("time_between_tokens_slo_ratio", "gaps", ratios)
        firsts = _wait_ratios(wait for step in steps for wait in step.first_tokens)
        self._take_ratios("time_to_first_token_slo_ratio", "first_tokens", firsts)
        self._take_predictions([step.traced for step in steps])

    def look(self, queues: Queues) -> None:
        """Take in the requests that run and wait now."""
        self.set("running_requests", queues.running)
        for name, slo_class in self.gauges:
            if name == "waiting_requests":
                self.gauges[name, slo_class] = 0.0
        for slo_class, waiting in queues.waiting.items():
            self.set("waiting_requests", waiting, slo_class)
        waiting_batch = sum(waiting for name, waiting in queues.waiting.items() if name in self.batch)
        self.set("batch_waiting_requests", waiting_batch)

    def _take_ratios(self, histogram: str, counter: str, ratios: list[tuple[str, float, int]]) -> None:
        for slo_class in {each for each, _, _ in ratios}:
            own = [(ratio, count) for each, ratio, count in ratios if each == slo_class]
            self._observe(histogram, slo_class, [r for r, _ in own], [n for _, n in own])
            self.count(counter, slo_class, sum(n for _, n in own))
            self.count(f"{counter}_kept", slo_class, sum(n for r, n in own if r <= 1.0))

    def _take_predictions(self, steps: "list[TracedStep]") -> None:
        predicted = [s for s in steps if s.hybrid and s.predicted_s is not None and s.predicted_s > 0]
        if not predicted:
            return
        self.count("step_predicted_seconds", amount=sum(s.predicted_s or 0.0 for s in predicted))
        self.count("step_measured_seconds", amount=sum(s.measured_s for s in predicted))
        ratios = [s.measured_s / s.predicted_s for s in predicted if s.predicted_s]
        self._observe("step_prediction_ratio", "", ratios, [1] * len(ratios))

    def _observe(self, name: str, slo_class: str, values: list[float], counts: list[int]) -> None:
        bounds = FIGURES[name].bounds
        known = self._histograms.setdefault((name, slo_class), _Buckets([0.0] * (len(bounds) + 1)))
        for value, count in zip(values, counts, strict=True):
            known.counts[bisect_left(bounds, value)] += count
            known.total += value * count

    def samples(self) -> Iterator[Sample]:
        """Yield every number, those of a histogram's buckets not yet summed up to them."""
        for (name, slo_class), value in self.counters.items():
            yield Sample(FIGURES[name], "_total", _labels(slo_class), value)
        for (name, slo_class), value in self.gauges.items():
            yield Sample(FIGURES[name], "", _labels(slo_class), value)
        for (name, slo_class), buckets in self._histograms.items():
            figure, labels = FIGURES[name], _labels(slo_class)
            for bound, count in zip((*figure.bounds, math.inf), buckets.counts, strict=True):
                le = "+Inf" if bound == math.inf else repr(float(bound))
                yield Sample(figure, "_bucket", (*labels, ("le", le)), count)
            yield Sample(figure, "_sum", labels, buckets.total)


def _wait_ratios(waits: Iterable[TokenWait]) -> list[tuple[str, float, int]]:
    return [(wait.slo_class, wait.taken_s / wait.slo_s, 1) for wait in waits if wait.slo_s is not None]


def _labels(slo_class: str) -> tuple[tuple[str, str], ...]:
    return (("slo_class", slo_class),) if slo_class else ()
