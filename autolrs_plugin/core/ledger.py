"""Ledger: what a run has cost so far, and how much of it the search took."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autolrs_plugin.core.actions import Action, Evaluate, Probe, Restore, Result, Snapshot, Train


@dataclass(frozen=True, slots=True)
class Cost:
    """What one kind of work has cost.

    Attributes:
        times: how often it was done.
        steps: training steps taken.
        tokens: tokens (or samples) trained on, where the run counts them.
        seconds: wall time.
    """

    times: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, steps: int = 0, tokens: int = 0, seconds: float = 0.0) -> "Cost":
        """Return this cost with one more piece of work in it."""
        return Cost(self.times + 1, self.steps + steps, self.tokens + tokens, self.seconds + seconds)


@dataclass
class Ledger:
    """The books of a run: every action's cost, under the kind of work that it was.

    Attributes:
        train: steps that the run kept.
        search: steps of probes, and training steps that were taken back.
        evaluation: evaluations of the validation loss along the run.
        search_evaluation: evaluations that served the search.
        snapshot: snapshots and restores.
        deciding_s: wall time of the decisions themselves (forecasts, Gaussian processes).
        bookkeeping_s: wall time of the journal, the states on disk, the fingerprints and the progress shown.
    """

    train: Cost = field(default_factory=Cost)
    search: Cost = field(default_factory=Cost)
    evaluation: Cost = field(default_factory=Cost)
    search_evaluation: Cost = field(default_factory=Cost)
    snapshot: Cost = field(default_factory=Cost)
    deciding_s: float = 0.0
    bookkeeping_s: float = 0.0

    def record(self, action: Action, result: Result) -> None:
        """Book an action that was carried out."""
        steps = len(result.losses)
        if isinstance(action, Train):
            self.train = self.train.plus(steps, result.tokens, result.seconds)
        elif isinstance(action, Probe):
            own_s = result.seconds - result.eval_seconds - result.restore_seconds
            self.search = self.search.plus(steps, result.tokens, own_s)
            self.snapshot = self.snapshot.plus(seconds=result.restore_seconds)
            if result.val_loss is not None:
                self.search_evaluation = self.search_evaluation.plus(seconds=result.eval_seconds)
        elif isinstance(action, Evaluate):
            self.evaluation = self.evaluation.plus(seconds=result.seconds)
        elif isinstance(action, Snapshot | Restore):
            self.snapshot = self.snapshot.plus(seconds=result.seconds)

    def take_back(self, steps: int) -> None:
        """Move the last training steps to the search: they were taken and then rolled back."""
        share = steps / self.train.steps if self.train.steps else 0.0
        tokens, seconds = round(self.train.tokens * share), self.train.seconds * share
        self.train = replace(
            self.train,
            steps=self.train.steps - steps,
            tokens=self.train.tokens - tokens,
            seconds=self.train.seconds - seconds,
        )
        self.search = self.search.plus(steps, tokens, seconds)

    @property
    def overhead(self) -> dict[str, float]:
        """What is neither training nor evaluation nor a snapshot, in seconds, by name: `take_over` takes it back."""
        return {"deciding_s": self.deciding_s, "bookkeeping_s": self.bookkeeping_s}

    def take_over(self, overhead: Mapping[str, float]) -> None:
        """Book the overhead of a run that is gone on with, in place of one's own so far."""
        self.deciding_s = overhead.get("deciding_s", 0.0)
        self.bookkeeping_s = overhead.get("bookkeeping_s", 0.0)

    @property
    def steps_total(self) -> int:
        """All training steps taken, the search's included."""
        return self.train.steps + self.search.steps

    @property
    def search_share(self) -> float:
        """The search's part of all training steps taken, from 0 to 1."""
        return self.search.steps / self.steps_total if self.steps_total else 0.0

    @property
    def seconds(self) -> float:
        """Wall time of everything booked."""
        parts = (self.train, self.search, self.evaluation, self.search_evaluation, self.snapshot)
        return sum(part.seconds for part in parts) + self.deciding_s + self.bookkeeping_s

    @property
    def step_seconds(self) -> float:
        """Mean wall time of a training step; 0 before the first one."""
        return (self.train.seconds + self.search.seconds) / self.steps_total if self.steps_total else 0.0

    @property
    def eval_cost_steps(self) -> float:
        """What one evaluation took, in training steps, as measured; 0 where none was timed."""
        times = self.evaluation.times + self.search_evaluation.times
        seconds = self.evaluation.seconds + self.search_evaluation.seconds
        return seconds / times / self.step_seconds if times and self.step_seconds else 0.0

    @property
    def snapshot_cost_steps(self) -> float:
        """What one snapshot or restore took, in training steps, as measured; 0 where none was timed."""
        if not self.snapshot.times or not self.step_seconds:
            return 0.0
        return self.snapshot.seconds / self.snapshot.times / self.step_seconds

    def to_mapping(self) -> dict[str, Any]:
        """Return the books as plain values."""
        derived = ("search_share", "eval_cost_steps", "snapshot_cost_steps")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
