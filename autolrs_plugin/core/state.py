"""RunState: what a run has done so far, kept up to date from each action and its result."""

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from autolrs_plugin.core.actions import Action, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.ledger import Ledger

Plan: TypeAlias = Generator[Action, Result, None]
"""A course of actions: yields each action and is sent its result. Ends when the run is complete."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A learning rate that was probed.

    Attributes:
        lr: the learning rate that it stands for (the probe's peak).
        lrs: the learning rate of each step taken.
        losses: the training loss of each step taken.
        val_loss: the validation loss after the probe, where it was evaluated.
        forecast: the loss that the search was told for it; infinite where it diverged.
        std: the standard deviation of that.
    """

    lr: float
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    val_loss: float | None
    forecast: float
    std: float

    @property
    def diverged(self) -> bool:
        """Whether the probe was ended early, or ended on no finite loss."""
        return not math.isfinite(self.forecast)


@dataclass(frozen=True, slots=True)
class Stage:
    """One search, and what it decided.

    Attributes:
        index: which stage, from 0.
        first_step: real steps taken before it.
        kind: why it was opened: `planned`, `change`, `stall`, `warm start`, `find` or `paper`.
        candidates: the probes, in the order in which they ran.
        chosen_lr: the learning rate decided for.
        search_steps: steps that its probes took.
        reason: why, the words of a sentence.
        low: the least learning rate that is not clearly worse than the best.
        high: the greatest such rate.
    """

    index: int
    first_step: int
    kind: str
    candidates: tuple[Candidate, ...]
    chosen_lr: float
    search_steps: int
    reason: str
    low: float = 0.0
    high: float = math.inf

    @property
    def moved(self) -> bool:
        """Whether it left the rate of its first probe, the one in use."""
        return self.chosen_lr != self.candidates[0].lr

    def to_mapping(self) -> dict[str, Any]:
        """Return the stage as plain values."""
        return asdict(self)


@dataclass
class RunState:
    """What has been done, in plain values.

    Attributes:
        lrs: the learning rate of every real step kept so far.
        losses: its training loss.
        kept_step: real steps taken when the kept state was taken; None while there is none.
        on_probe_weights: whether the weights are a probe's, and no real step may be taken on them.
        val_losses: (step, validation loss) of each evaluation along the run.
        search_cost_steps: what the search has taken of its budget: steps, and evaluations at their declared cost.
        ahead: probes that were decided on together, in order.
    """

    config: AutoLRSConfig
    ledger: Ledger = field(default_factory=Ledger)
    stages: list[Stage] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    kept_step: int | None = None
    on_probe_weights: bool = False
    search_cost_steps: float = 0.0
    ahead: tuple[Probe, ...] = ()

    @property
    def step(self) -> int:
        """Real steps kept so far."""
        return len(self.lrs)

    @property
    def budget_left_steps(self) -> float:
        """What the search may still take, in steps."""
        return self.config.search_budget * self.config.max_steps - self.search_cost_steps

    def observe(self, action: Action, result: Result) -> None:
        """Take in an action that was carried out."""
        self.ledger.record(action, result)
        if isinstance(action, Snapshot):
            self.kept_step = self.step
        elif isinstance(action, Probe):
            self.on_probe_weights = True
            self.search_cost_steps += len(result.losses)
            if result.val_loss is not None:
                self.search_cost_steps += self.config.eval_cost_steps
        elif isinstance(action, Train):
            self.lrs.extend(action.lrs)
            self.losses.extend(result.losses)
        elif isinstance(action, Restore):
            self._restore()
        elif result.val_loss is not None:
            self.val_losses.append((self.step, result.val_loss))

    def _restore(self) -> None:
        assert self.kept_step is not None, "a restore without a snapshot"
        self.on_probe_weights = False
        taken_back = self.step - self.kept_step
        if taken_back:
            self.ledger.take_back(taken_back)
            self.search_cost_steps += taken_back
            del self.lrs[self.kept_step :], self.losses[self.kept_step :]
            self.val_losses = [(step, loss) for step, loss in self.val_losses if step <= self.kept_step]


def probe_together(
    state: RunState, probes: Sequence[Probe], again: bool = False
) -> Generator[Action, Result, list[Result]]:
    """Take probes that were decided on together, one action each; return their results, in order.

    They are announced in `state.ahead`, so that whoever carries them out may do so in parallel. One that was stopped is
    the last, or is taken `again`.
    """
    results: list[Result] = []
    state.ahead = tuple(probes)
    while len(results) < len(probes):
        result = yield probes[len(results)]
        if not (result.stopped and again):
            results.append(result)
        if result.stopped and not again:
            break
    state.ahead = ()
    return results
