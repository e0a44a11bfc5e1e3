"""The default plan: find the peak of a decaying schedule early, then train along it."""

import math
from collections.abc import Generator, Sequence
from typing import TypeAlias

import numpy as np

from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot
from autolrs_plugin.core.schedule import unit_curve, warmup_steps
from autolrs_plugin.core.search import LRSearch
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage
from autolrs_plugin.core.training_plan import chunk_steps, diverged_above, train

RANGE_SHARE = 0.125
RANGE_STEPS = (4, 10)
"""Share of the search's steps that the range test takes; its least length, and the length that it should have."""

WINDOW = 30.0
"""The coarse probes reach from the range test's reference down to it divided by this."""

COARSE_PROBES, COARSE_SHARE = 4, 0.4
FINE_PROBES, FINE_RATIO = 3, 2.5
LEAST_PROBE = 4
PROBE_WARMUP = 0.2
TAIL = 1 / 3
EVALUATE_UP_TO = 0.25
"""A probe is evaluated if that costs no more than this share of its steps."""

Search: TypeAlias = Generator[Action, Result, float]


def peak_plan(state: RunState) -> Plan:
    """Search the peak from the first weights, then train along a schedule with that peak."""
    config = state.config
    yield Snapshot()
    search = _PeakSearch(state)
    peak = yield from search.run()
    yield Restore()
    steps, warmup = config.max_steps, warmup_steps(config)
    yield from train(
        state, lambda t: peak * unit_curve(t, steps, warmup, config.final_decay), steps, search.above
    )
    yield Done()


class _PeakSearch:
    """The search for the peak."""

    def __init__(self, state: RunState) -> None:
        self._state, self._config = state, state.config
        self._low, self._high = state.config.lr_range
        self._candidates: list[Candidate] = []
        self.above = math.inf

    @property
    def _left_steps(self) -> float:
        """What the search may still take; a chunk is kept back, to be thrown away if training diverges."""
        return self._state.budget_left_steps - chunk_steps(self._state)

    def run(self) -> Search:
        """Return the peak."""
        least, wanted = RANGE_STEPS
        steps = min(max(wanted, round(RANGE_SHARE * self._left_steps)), int(self._left_steps))
        if steps < least:
            return math.sqrt(self._low * self._high)
        reference = yield from self._range_test(steps)
        low = max(self._low, reference / WINDOW)
        rates = np.geomspace(low, max(reference, low), COARSE_PROBES)
        steps = int(COARSE_SHARE * self._left_steps / COARSE_PROBES)
        if steps < LEAST_PROBE or not low < reference:
            return float(rates[COARSE_PROBES // 2])
        coarse = LRSearch(low, reference)
        yield from self._probe_all(coarse, rates, steps, evaluate=False)
        best = self._close(coarse, "")
        if all(o.diverged for o in coarse.observations):
            return best
        top = min(self._high, FINE_RATIO**2 * best, 0.999 * coarse.ceiling)
        fine = LRSearch(max(self._low, best / FINE_RATIO**2), top)
        rates = np.clip(best * FINE_RATIO ** (np.arange(FINE_PROBES) - (FINE_PROBES - 1) / 2), fine.low, top)
        steps, evaluate = self._longest(FINE_PROBES)
        if steps < LEAST_PROBE:
            return best
        yield from self._probe_all(fine, rates, steps, evaluate)
        told = [o.std for o in coarse.observations if not o.diverged]
        fine.warm_start(coarse, doubt=DOUBT * max(told))
        return self._close(fine, "")

    def _longest(self, probes: int) -> tuple[int, bool]:
        """Return the length of so many probes that take what is left, and whether they are evaluated."""
        each = self._left_steps / probes
        cost = self._config.eval_cost_steps
        evaluate = self._config.validation and cost <= EVALUATE_UP_TO * (each - cost)
        return int(each - cost if evaluate else each), evaluate

    def _range_test(self, steps: int) -> Search:
        rates = tuple(float(lr) for lr in np.geomspace(self._low, self._high, steps))
        result = yield Probe(0, 0, rates, math.inf, False)
        losses = np.array(result.losses)
        self.first = float(np.median(losses[: max(1, steps // 6)]))
        self.above = diverged_above(self.first)
        held = next((i for i, loss in enumerate(losses) if not loss <= self.above), len(losses))
        padded = np.pad(losses[:held], 1, mode="edge")
        smooth = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        reference = rates[max(0, int(np.argmin(smooth)) - 1)]
        candidate = Candidate(reference, rates[: len(losses)], result.losses, None, float(smooth.min()), 0.0)
        self._state.stages.append(Stage(0, 0, "range", (candidate,), reference, len(losses), ""))
        return reference

    def _probe_all(self, search: LRSearch, rates: Sequence[float], steps: int, evaluate: bool) -> Plan:
        for lr in rates:
            warmup = max(1, round(PROBE_WARMUP * steps))
            lrs = tuple(float(lr) * unit_curve(t, steps, warmup) for t in range(steps))
            index = len(self._candidates)
            result = yield Probe(len(self._state.stages), index, lrs, self.above, evaluate)
            loss, std = self._judge(result, steps)
            search.tell(float(lr), loss, max(SC * std, NOISE * max(0.0, self.first - loss)) if math.isfinite(loss) else 0.0)
            told = search.observations[-1]
            self._candidates.append(
                Candidate(float(lr), lrs[: len(result.losses)], result.losses, result.val_loss, told.loss, told.std)
            )

    def _judge(self, result: Result, steps: int) -> tuple[float, float]:
        if len(result.losses) < steps or not result.losses[-1] <= self.above:
            return math.inf, 0.0
        tail = np.array(result.losses[-max(2, int(TAIL * steps)) :])
        loss, std = float(tail.mean()), float(tail.std()) / math.sqrt(len(tail))
        if result.val_loss is not None:
            loss = 0.5 * (loss + result.val_loss)
        return (loss, std) if loss <= self.above else (math.inf, 0.0)

    def _close(self, search: LRSearch, reason: str) -> float:
        decision = search.decide()
        spent = sum(len(c.losses) for c in self._candidates)
        stages = self._state.stages
        stages.append(
            Stage(len(stages), self._state.step, "peak", tuple(self._candidates), decision.lr, spent, reason)
        )
        self._candidates = []
        return decision.lr


SC = 0.0
NOISE = 0.1
DOUBT = 1.0
