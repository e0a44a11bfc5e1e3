"""The default plan: find the peak of the schedule before the first step, then train along it.

Notation: N is the number of steps of the run, n that of a probe, a peak the greatest learning rate of a schedule.

1. Range test (Smith 2017): one probe whose rate rises over the whole range. The reference is where its loss was
   lowest. Where minibatches scatter too much to see that, the same minibatches at the lowest rate are subtracted;
   the difference has little noise, and is not smoothed: the explosion next to the minimum would hide it.
2. Four coarse probes from reference / WINDOW to the reference, then three longer ones around the least rate that is
   about as good as any of those. Each is a whole run in miniature, with warm-up and decay to zero: its cool-down tail
   shows what its rate has achieved. All of a stage see the same minibatches. A Gaussian process smooths them; the
   coarse ones are moved to the level of the fine ones and believed less.
3. The run: warm-up, a plateau at HORIZON times the smoothed optimum, linear decay to zero over the last fifth.

A chunk of training is kept back from the budget, to be thrown away if the run diverges (`training_plan`).

What lost, by validation loss on the reference tasks of `autolrs bench` (seed 0 where none is said):

* The probes' optimum as the peak: cosines of C steps end at 2.17 instead of 2.03 (stdlib-gpt, 1e-2 and 3e-3), 2.27
  instead of 2.20 (bert-mlm); on mnist-resnet 0.03 and 0.1 are alike (0.133, 0.130). Hence HORIZON.
* Decay over the whole run: 2.126, against 2.058 over the last half and 2.048 over the last fifth (stdlib-gpt, peak
  3e-3); 2.252, 2.226 and 2.234 (bert-mlm). Cosine and linear decays of equal length: no winner in nine peaks.
* A decay by 1 - sqrt (Haegele et al. 2024), means of three seeds on stdlib-gpt, bert-mlm, mnist-resnet: 2.038, 2.239,
  0.132 over the last fifth, 2.063, 2.249, 0.121 over the last third, against 2.029, 2.235, 0.132; linear over the last
  third: 2.040, 2.241, 0.130. A HORIZON of 1/2: 2.025, 2.230, 0.129: no more than seeds differ by.
* Probes believed as they are: above the limit of stability the same rate (9.2e-3, stdlib-gpt) came to 3.24 and to
  3.92. With the standard error of the tail as the noise, four seeds chose 5.5e-3 to 4.5e-2.
* The lowest coarse probe as the centre of the fine ones: on the flat part beyond the optimum chance decided, and one
  seed of stdlib-gpt trained at 2.1e-2 and ended at 2.44 instead of 2.02. With the least rate that is about as good,
  peaks lie within a factor of 1.7 over five seeds. The same rule for the fine probes: down to 1.6e-4 (bert-mlm).
* Probes that warm up for half of their length: choices from 4e-3 to 3.5e-2, against 1e-2 to 2e-2 with a fifth.
* The validation loss alone as a probe's result: after 20 steps the statistics of batch normalisation lag behind, and
  it is 1.99 where the training loss is 1.59. The training loss alone: picks 0.56 on mnist-resnet, twice too much.
* A range test without the second one: with minibatches of two rows its minimum was noise, 3.6e-5 and 2.2e-4 in two
  seeds; with it 7.7e-3 in both (smollm-lora).
* A budget of 0.15, before the rule of the least rate: 1.994 instead of 2.020, 2.222 instead of 2.232, but 0.121
  instead of 0.100 (stdlib-gpt, bert-mlm, mnist-resnet): no winner.

Not tried: probes from a warmed-up state, a second search along the run, forecasts of probes.
"""

import math
from collections.abc import Generator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot
from autolrs_plugin.core.schedule import run_curve, unit_curve
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
"""How many coarse probes there are, and their share of what the range test leaves; they are not evaluated."""

FINE_PROBES, FINE_RATIO = 3, 2.5
"""How many fine probes there are, and the ratio of the middle one's peak to the outer ones'."""

LEAST_PROBE_STEPS = 5
"""Probes shorter than this tell nothing: one round instead of two, or none."""

PROBE_WARMUP = 0.2
"""Share of a probe over which it warms up."""

TAIL = 1 / 3
"""A probe is judged by its training losses in this last share of it, and by its validation loss."""

EVALUATION_SHARE = 0.25
"""A probe is evaluated if that costs no more than this share of its steps."""

NOISE = 0.1
"""Standard deviation of a probe's loss, as a share of the progress that it made."""

HORIZON = 1 / 3
"""A whole run's best peak, as a share of the best peak of probes a hundredth to a thirtieth as long."""

Search: TypeAlias = Generator[Action, Result, float]
"""A part of the search: asks for probes, and returns a learning rate."""


def peak_plan(state: RunState) -> Plan:
    """Search the peak from the first weights, then train along a schedule with that peak."""
    config, search = state.config, PeakSearch(state)
    peak = math.sqrt(config.lr_range[0] * config.lr_range[1])
    if search.range_steps:
        yield Snapshot()
        peak = yield from search.run()
        yield Restore()
    yield from train(state, lambda t: peak * run_curve(t, config), config.max_steps, search.above)
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
    def range_steps(self) -> int:
        """The length of the range test; 0 where the budget has no room for one."""
        least, wanted = RANGE_STEPS
        steps = min(max(wanted, round(RANGE_SHARE * self._left_steps)), int(self._left_steps))
        if steps < least:
            return 0
        # Short of steps, half of them for each of two: noise alone would point anywhere in the range.
        return min(steps, max(least, int(self._left_steps / 2)))

    def run(self) -> Search:
        """Return the peak: by the fine probes, or by what came before them where the budget ends earlier."""
        reference = yield from self._range_test(self.range_steps)
        low = max(self._low, reference / WINDOW)
        reference = max(reference, min(2 * low, self._high))
        rates = np.geomspace(low, reference, COARSE_PROBES)
        steps, evaluate = int(COARSE_SHARE * self._left_steps / COARSE_PROBES), False
        two_rounds = steps >= LEAST_PROBE_STEPS
        if not two_rounds:
            steps, evaluate = self._longest(COARSE_PROBES)
        if steps < LEAST_PROBE_STEPS:
            return math.sqrt(low * reference)
        coarse = LRSearch(low, reference)
        peak = yield from self._round(coarse, rates, steps, evaluate, last=not two_rounds)
        probes, factor = self._fine_probes, FINE_RATIO**2
        low, high = max(self._low, peak / factor), min(self._high, peak * factor, 0.999 * coarse.ceiling)
        # Below the lowest rate that diverged there may be none: a fault of the job's own can make any probe diverge.
        if not two_rounds or high <= low or all(o.diverged for o in coarse.observations):
            return peak
        rates = np.clip(peak * FINE_RATIO ** np.linspace(-1, 1, probes), low, high)
        steps, evaluate = self._longest(probes)
        return (yield from self._round(LRSearch(low, high), rates, steps, evaluate, coarse, last=True))

    @property
    def _fine_probes(self) -> int:
        """One more than otherwise, and each a little shorter, where that leaves nobody idle."""
        at_once = self._config.parallel_probes
        return FINE_PROBES + 1 if at_once > 1 and (FINE_PROBES + 1) % at_once == 0 else FINE_PROBES

    @property
    def _left_steps(self) -> float:
        """What the search may still take; a chunk is kept back, to be thrown away if training diverges."""
        return self._state.budget_left_steps - chunk_steps(self._state)

    def _longest(self, probes: int) -> tuple[int, bool]:
        """Return the length of so many probes that take all that is left, and whether they are evaluated."""
        each, cost = self._left_steps / probes, self._config.eval_cost_steps
        evaluate = self._config.validation and cost <= EVALUATION_SHARE * (each - cost)
        return int(each - cost if evaluate else each), evaluate

    def _range_test(self, steps: int) -> Search:
        """Raise the learning rate over the whole range; return the one with the lowest loss."""
        rates = tuple(float(lr) for lr in np.geomspace(self._low, self._high, steps))
        (rising,) = yield from self._probe(0, [rates], math.inf)
        candidates = [_candidate(rates, rising, rising.losses[-1], 0.0)]
        losses: Array = np.array(rising.losses)
        early = losses[: max(2, steps // 3)]
        if not np.isfinite(early).all():
            return self._close("range", candidates, self._low, "the loss was not finite from the start")
        self.first_loss, scatter = float(np.median(early)), float(np.std(early))
        self.above = max(diverged_above(self.first_loss), self.first_loss + DIVERGED_Z * scatter)
        held = next((i for i, loss in enumerate(losses) if not loss <= self.above), len(losses))
        if held < len(losses):
            candidates = [_candidate(rates, rising, math.inf, 0.0)]
        losses = losses[: max(1, held)]
        if scatter > RANGE_NOISE * (self.first_loss - losses.min()) and self._left_steps >= len(losses):
            # The same minibatches at the lowest rate: what is left of the difference is the learning rate's.
            flat = (self._low,) * len(losses)
            (still,) = yield from self._probe(1, [flat], self.above)
            candidates.append(_candidate(flat, still, still.losses[-1], 0.0))
            losses = losses[: len(still.losses)] - np.array(still.losses)
            self.above = max(self.above, self.first_loss + DIVERGED_Z * float(np.std(still.losses)))
        else:
            padded = np.pad(losses, 1, mode="edge")
            losses = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        # The loss of a step is that before its update: it shows the learning rate of the step before.
        reference = rates[max(0, int(np.argmin(losses)) - 1)]
        return self._close(
            "range", candidates, reference, "the loss was lowest here while the learning rate rose"
        )

    def _round(
        self,
        search: LRSearch,
        rates: Array,
        steps: int,
        evaluate: bool,
        earlier: LRSearch | None = None,
        last: bool = False,
    ) -> Search:
        """Probe learning rates, each a whole run in miniature; return the best one, of a whole run if `last`."""
        warmup = max(1, round(PROBE_WARMUP * steps))
        unit = [unit_curve(t, steps, warmup) for t in range(steps)]
        curves = [tuple(float(lr) * share for share in unit) for lr in rates]
        results = yield from self._probe(0, curves, self.above, evaluate)
        losses = [self._judge(result, steps) for result in results]
        # Where minibatches scatter more than a probe gains, some probe's loss is above the first one.
        worst = max([self.first_loss, *filter(math.isfinite, losses)])
        candidates = []
        for lr, curve, result, loss in zip(map(float, rates), curves, results, losses, strict=True):
            search.tell(lr, loss, NOISE * (worst - loss) if math.isfinite(loss) else 0.0)
            told = search.observations[-1]
            candidates.append(_candidate(curve, result, told.loss, told.std, lr))
        held = [o.std for o in search.observations if not o.diverged]
        if not held and len({len(result.losses) for result in results}) == 1:
            # Divergence comes the later the lower the rate is; a minibatch that is hard, at one step for all.
            return self._close(
                "peak", candidates, math.sqrt(rates[0] * rates[-1]), "one step was too hard at any rate"
            )
        if earlier is not None and held:
            search.warm_start(earlier, doubt=max(held))
        if not last:
            reason = f"the least rate that is about as good as any after {steps} steps"
            return self._close("peak", candidates, _least_good(search), reason)
        best = search.decide().lr
        reason = f"{best:.3g} was the best after {steps} steps, as smoothed; a longer run wants less"
        return self._close("peak", candidates, max(self._low, HORIZON * best), reason)

    def _probe(
        self, first: int, curves: Sequence[tuple[float, ...]], above: float, evaluate: bool = False
    ) -> Generator[Action, Result, list[Result]]:
        """Take a probe for each curve of learning rates; all of a stage see the same minibatches.

        None of them waits for another's result, so all are announced: who is free takes the next.
        """
        stage = len(self._state.stages)
        probes = [Probe(stage, first + i, lrs, above, evaluate) for i, lrs in enumerate(curves)]
        return (yield from probe_together(self._state, probes))

    def _judge(self, result: Result, steps: int) -> float:
        """Return the loss that a probe came to; infinite if it diverged."""
        if len(result.losses) < steps or not result.losses[-1] <= self.above:
            return math.inf
        loss = float(np.mean(result.losses[-max(2, int(TAIL * steps)) :]))
        if result.val_loss is not None:
            loss = (loss + result.val_loss) / 2
        return loss if loss <= self.above else math.inf

    def _close(self, kind: str, candidates: Sequence[Candidate], lr: float, reason: str) -> float:
        """Book a stage with its decision, and return that."""
        stages, spent = self._state.stages, sum(len(c.losses) for c in candidates)
        stages.append(Stage(len(stages), self._state.step, kind, tuple(candidates), lr, spent, reason))
        return lr


def _least_good(search: LRSearch) -> float:
    """Return the least learning rate whose smoothed loss is within a standard deviation of the lowest."""
    best = search.decide()
    if not math.isfinite(best.loss):
        return best.lr
    mean, _ = search.posterior(search.grid)
    return float(search.grid[int(np.argmax(mean <= best.loss + best.std))])


def _candidate(
    lrs: tuple[float, ...], result: Result, loss: float, std: float, lr: float | None = None
) -> Candidate:
    """Return a probe as it is booked, with what the search was told; its learning rate is the last one if not given."""
    taken = len(result.losses)
    told = loss if math.isfinite(loss) else math.inf
    return Candidate(lrs[-1] if lr is None else lr, lrs[:taken], result.losses, result.val_loss, told, std)
