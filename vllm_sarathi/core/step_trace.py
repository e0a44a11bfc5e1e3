"""The step trace: one JSON object per line and step, and what it says about a run."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_sarathi.core.types import StepShape


class StepTraceError(ValueError):
    """A trace that cannot be read; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One finished step.

    Attributes:
        at_s: when it completed, seconds since the epoch.
        shape: what it computed.
        token_budget: the most tokens that it was allowed, decodes included.
        reason: what set the budget, one word of `Reason`.
        predicted_s: how long it was expected to take, seconds; None without a prediction.
        measured_s: seconds between the completion before it and its own, or since its start after an idle time.
        slo_s: how long it was allowed to take, seconds: the SLO for the time between tokens, over the steps that end
            between two tokens of a request (more than one in a pipeline). None where there was no SLO.
        running: requests that were running.
        waiting: requests that waited.
    """

    at_s: float
    shape: StepShape
    token_budget: int
    reason: str
    predicted_s: float | None
    measured_s: float
    slo_s: float | None
    running: int
    waiting: int

    @property
    def hybrid(self) -> bool:
        """True where decodes and prefill shared the step."""
        return self.shape.decodes > 0 and self.shape.prefill_work > 0

    @property
    def relative_error(self) -> float | None:
        """As `relative_error` of its times."""
        return relative_error(self.predicted_s, self.measured_s)

    def to_line(self) -> str:
        """Return the step as a line of the trace."""
        shape = self.shape
        values = {
            "at_s": round(self.at_s, 6),
            "tokens": shape.tokens,
            "decodes": shape.decodes,
            "decode_context_tokens": shape.decode_context_tokens,
            "prefill_work": shape.prefill_work,
            "sequences": shape.sequences,
            "encoder_tokens": shape.encoder_tokens,
            "token_budget": self.token_budget,
            "reason": self.reason,
            "predicted_s": None if self.predicted_s is None else round(self.predicted_s, 6),
            "measured_s": round(self.measured_s, 6),
            "slo_s": self.slo_s,
            "running": self.running,
            "waiting": self.waiting,
        }
        return json.dumps(values) + "\n"


_INTEGERS = ("tokens", "decodes", "decode_context_tokens", "sequences", "token_budget", "running", "waiting")
_NUMBERS = ("at_s", "prefill_work", "measured_s")
_NUMBERS_OR_NULL = ("predicted_s", "slo_s")


def parse_line(line: str) -> TracedStep:
    """Return the step in a line of the trace.

    Raises:
        ValueError: the line is none; the message says why.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"must hold a JSON object, not {type(values).__name__}")
    missing = [k for k in (*_INTEGERS, *_NUMBERS, *_NUMBERS_OR_NULL, "reason") if k not in values]
    if missing:
        raise ValueError(f"has no {missing[0]!r}")
    for key in (*_INTEGERS, *_NUMBERS):
        _check_number(key, values[key], int if key in _INTEGERS else (int, float))
    for key in _NUMBERS_OR_NULL:
        if values[key] is not None:
            _check_number(key, values[key], (int, float))
    if values["measured_s"] <= 0 or not isinstance(values["reason"], str):
        raise ValueError("has a step without a length, or a reason that is not text")
    values.setdefault("encoder_tokens", 0)  # older traces have none
    _check_number("encoder_tokens", values["encoder_tokens"], int)
    shape = StepShape(**{name: values.pop(name) for name in StepShape.__dataclass_fields__})
    return TracedStep(shape=shape, **{k: values[k] for k in TracedStep.__dataclass_fields__ if k != "shape"})


def _check_number(key: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"has {key!r} {value!r}, which must be a number of at least 0")


def relative_error(predicted_s: float | None, measured_s: float) -> float | None:
    """Return how far a prediction was off, as a share of the measured time; None without a prediction."""
    return None if predicted_s is None else abs(predicted_s - measured_s) / measured_s


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of at least one value, linearly interpolated."""
    return float(np.quantile(values, share))


@dataclass(frozen=True)
class StepSummary:
    """What a stretch of steps came to.

    Attributes:
        steps: how many there were.
        running, waiting: requests, at the last of them.
        budget_tokens: the median budget of the steps in which prompts were prefilled beside decodes; None without any.
        slo_s: as in TracedStep, at the last of them.
        gaps: tokens delivered to decodes: each ended a gap as long as its step.
        gaps_kept: those of them within the SLO.
        error_p50, error_p90: relative errors of the predictions of hybrid steps; None without any.
        decode_step_s: the median of steps of decodes alone, seconds; None without any.
    """

    steps: int
    running: int
    waiting: int
    budget_tokens: int | None
    slo_s: float | None
    gaps: int
    gaps_kept: int
    error_p50: float | None
    error_p90: float | None
    decode_step_s: float | None

    @property
    def attainment(self) -> float | None:
        """The share of gaps within the SLO; None without an SLO, or where none ended."""
        return self.gaps_kept / self.gaps if self.gaps and self.slo_s is not None else None


def summarise_steps(steps: Sequence[TracedStep]) -> StepSummary:
    """Sum up at least one step."""
    assert steps
    hybrid = [step for step in steps if step.hybrid]
    errors = [e for step in hybrid if (e := step.relative_error) is not None]
    alone = [s.measured_s for s in steps if s.shape.decodes > 0 and s.shape.prefill_work == 0]
    with_slo = [step for step in steps if step.slo_s is not None]
    kept = [s for s in with_slo if s.slo_s is not None and s.measured_s <= s.slo_s]
    return StepSummary(
        steps=len(steps),
        running=steps[-1].running,
        waiting=steps[-1].waiting,
        budget_tokens=int(statistics.median([s.token_budget for s in hybrid])) if hybrid else None,
        slo_s=steps[-1].slo_s,
        gaps=sum(step.shape.decodes for step in with_slo),
        gaps_kept=sum(step.shape.decodes for step in kept),
        error_p50=quantile(errors, 0.5) if errors else None,
        error_p90=quantile(errors, 0.9) if errors else None,
        decode_step_s=statistics.median(alone) if alone else None,
    )
