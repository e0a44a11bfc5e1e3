"""The default plan: find the peak of a decaying schedule early, then train along it."""

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot
from autolrs_plugin.core.schedule import unit_curve, warmup_steps
from autolrs_plugin.core.search import LRSearch
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage, probe_together
from autolrs_plugin.core.training_plan import chunk_steps, diverged_above, train

Array = NDArray[np.float64]

RANGE_SHARE = 0.125
"""Share of the search's steps that the range test takes."""

RANGE_STEPS = (4, 10)
"""The least length of a range test, and the length that it has at least where the budget allows."""

RANGE_NOISE = 0.1
"""A range test whose losses scatter by more than this share of its fall is told from a second one that stands still."""

DIVERGED_Z = 5.0
"""A loss above the first ones by less than so many of their standard deviations may be a hard minibatch."""

WINDOW = 30.0
"""The coarse probes reach from the reference down to it divided by this."""

COARSE_PROBES, COARSE_SHARE = 4, 0.4
FINE_PROBES, FINE_RATIO = 3, 2.5
LEAST_PROBE_STEPS = 5
PROBE_WARMUP = 0.2
TAIL = 1 / 3
"""A probe is judged by its training losses in this last share of it, and by its validation loss."""

EVALUATION_SHARE = 0.25
"""A probe is evaluated if that costs no more than this share of its steps."""

NOISE = 0.1
"""Standard deviation of a probe's loss, as a share of the progress that it made."""

Search: TypeAlias = Generator[Action, Result, float]
"""A part of the search: asks for probes, and returns a learning rate."""


def peak_plan(state: RunState) -> Plan:
    """Search the peak from the first weights, then train along a schedule with that peak."""
    config = state.config
    yield Snapshot()
    search = PeakSearch(state)
    peak = yield from search.run()
    yield Restore()
    steps, warmup = config.max_steps, warmup_steps(config)
    yield from train(
        state, lambda t: peak * unit_curve(t, steps, warmup, config.final_decay), steps, search.above
    )
    yield Done()


class PeakSearch:
    """The search for the peak of a run; `run` asks for the probes.

    Attributes:
        first_loss: the loss at the first weights, once the range test has been run.
        above: a loss above this has diverged; infinite before the range test.
    """

    def __init__(self, state: RunState) -> None:
        self._state, self._config = state, state.config
        self._low, self._high = state.config.lr_range
        self.first_loss = self.above = math.inf

    @property
    def _left_steps(self) -> float:
        """What the search may still take; a chunk is kept back, to be thrown away if training diverges."""
        return self._state.budget_left_steps - chunk_steps(self._state)

    def run(self) -> Search:
        """Return the peak: of the fine probes, or of what came before them where the budget ends earlier."""
        least, wanted = RANGE_STEPS
        steps = min(max(wanted, round(RANGE_SHARE * self._left_steps)), int(self._left_steps))
        if steps < least:
            return math.sqrt(self._low * self._high)
        reference = yield from self._range_test(steps)
        low = max(self._low, reference / WINDOW)
        reference = max(reference, min(2 * low, self._high))
        coarse = LRSearch(low, reference)
        rates = np.geomspace(low, reference, COARSE_PROBES)
        steps = int(COARSE_SHARE * self._left_steps / COARSE_PROBES)
        evaluate = False
        if steps < LEAST_PROBE_STEPS:
            # Too little for two rounds: one of longer probes.
            steps, evaluate = self._length(COARSE_PROBES)
        if steps < LEAST_PROBE_STEPS:
            return math.sqrt(low * reference)
        peak = yield from self._round(coarse, rates, steps, evaluate)
        steps, evaluate = self._length(FINE_PROBES)
        if steps < LEAST_PROBE_STEPS or all(o.diverged for o in coarse.observations):
            return peak
        low, high = self._around(peak, FINE_RATIO**2, coarse.ceiling)
        rates = peak * FINE_RATIO ** (np.arange(FINE_PROBES) - (FINE_PROBES - 1) / 2)
        fine = LRSearch(low, high)
        return (yield from self._round(fine, np.clip(rates, low, high), steps, evaluate, coarse))

    def _around(self, lr: float, factor: float, ceiling: float) -> tuple[float, float]:
        """Return the range of a factor around a learning rate, inside what is allowed and has not diverged."""
        return max(self._low, lr / factor), min(self._high, lr * factor, 0.999 * ceiling)

    def _length(self, probes: int) -> tuple[int, bool]:
        """Return the length of so many probes that take all that is left, and whether they are evaluated."""
        each = self._left_steps / probes
        cost = self._config.eval_cost_steps
        evaluate = self._config.validation and cost <= EVALUATION_SHARE * (each - cost)
        return int(each - cost if evaluate else each), evaluate

    def _range_test(self, steps: int) -> Search:
        """Raise the learning rate over the whole range; return the one with the lowest loss."""
        rates = tuple(float(lr) for lr in np.geomspace(self._low, self._high, steps))
        probes = _Probes(self._state, "range")
        losses: Array = np.array((yield from probes.run(rates[-1], rates, math.inf)).losses)
        early = losses[: max(2, steps // 3)]
        self.first_loss, scatter = float(np.median(early)), float(np.std(early))
        self.above = max(diverged_above(self.first_loss), self.first_loss + DIVERGED_Z * scatter)
        held = next((i for i, loss in enumerate(losses) if not loss <= self.above), len(losses))
        if not held:
            return probes.close(self._low, "the loss is not finite from the start")
        losses = losses[:held]
        if scatter > RANGE_NOISE * (self.first_loss - float(losses.min())) and self._left_steps >= steps:
            # The same minibatches at the lowest rate: what is left of the difference is the learning rate's.
            still = yield from probes.run(self._low, (self._low,) * held, self.above)
            losses = losses[: len(still.losses)] - np.array(still.losses)
        padded = np.pad(losses, 1, mode="edge")
        smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        # The loss of a step is that before its update: it shows the learning rate of the step before.
        reference = rates[max(0, int(np.argmin(smooth)) - 1)]
        return probes.close(reference, "where the loss was lowest while the learning rate rose")

    def _round(
        self,
        search: LRSearch,
        rates: Sequence[float] | Array,
        steps: int,
        evaluate: bool,
        earlier: LRSearch | None = None,
    ) -> Search:
        """Probe learning rates, each a whole run in miniature on the same minibatches; return the best one."""
        probes = _Probes(self._state, "peak")
        warmup = max(1, round(PROBE_WARMUP * steps))
        unit = [unit_curve(t, steps, warmup) for t in range(steps)]
        curves = [tuple(float(lr) * share for share in unit) for lr in rates]
        results = yield from probes.together([float(lr) for lr in rates], curves, self.above, evaluate)
        for index, (lr, result) in enumerate(zip(rates, results, strict=True)):
            loss = self._judge(result, steps)
            std = max(NOISE * (self.first_loss - loss), 0.0) if math.isfinite(loss) else 0.0
            search.tell(float(lr), loss, std)
            probes.tell(index, loss, std)
        held = [o for o in search.observations if not o.diverged]
        if earlier is not None and held:
            search.warm_start(earlier, doubt=max(o.std for o in held))
        decision = search.decide()
        return probes.close(decision.lr, f"the lowest loss after {steps} steps, as smoothed")

    def _judge(self, result: Result, steps: int) -> float:
        """Return the loss that a probe came to; infinite if it diverged."""
        if len(result.losses) < steps or not result.losses[-1] <= self.above:
            return math.inf
        loss = float(np.mean(result.losses[-max(2, int(TAIL * steps)) :]))
        if result.val_loss is not None:
            loss = (loss + result.val_loss) / 2
        return loss if loss <= self.above else math.inf


class _Probes:
    """The probes of one stage, as they are asked for and booked."""

    def __init__(self, state: RunState, kind: str) -> None:
        self._state, self._kind = state, kind
        self._candidates: list[Candidate] = []

    def run(
        self, lr: float, lrs: tuple[float, ...], above: float, evaluate: bool = False
    ) -> Generator[Action, Result, Result]:
        """Ask for a probe; all of a stage see the same minibatches."""
        [result] = yield from self.together([lr], [lrs], above, evaluate)
        return result

    def together(
        self, rates: Sequence[float], curves: Sequence[tuple[float, ...]], above: float, evaluate: bool
    ) -> Generator[Action, Result, list[Result]]:
        """Ask for probes of which none waits for another's result."""
        stage, first = len(self._state.stages), len(self._candidates)
        probes = [Probe(stage, first + i, lrs, above, evaluate) for i, lrs in enumerate(curves)]
        results = yield from probe_together(self._state, probes)
        for lr, lrs, result in zip(rates, curves, results, strict=True):
            taken = len(result.losses)
            last = result.losses[-1] if taken == len(lrs) else math.inf
            loss = last if math.isfinite(last) else math.inf
            self._candidates.append(Candidate(lr, lrs[:taken], result.losses, result.val_loss, loss, 0.0))
        return results

    def tell(self, index: int, loss: float, std: float) -> None:
        """Note what the search was told of a probe."""
        self._candidates[index] = replace(self._candidates[index], forecast=loss, std=std)

    def close(self, lr: float, reason: str) -> float:
        """Book the stage with its decision, and return that."""
        stages, candidates = self._state.stages, tuple(self._candidates)
        spent = sum(len(c.losses) for c in candidates)
        stages.append(Stage(len(stages), self._state.step, self._kind, candidates, lr, spent, reason))
        return lr
