"""StepTimeModel: how long a step of this shape takes, learnt from the steps as they happen.

The curve is that of `features`, with all coefficients at or above zero, since no part of a step can take negative
time. The fit is least squares of the *relative* error: a 40 ms step and a 4 s step count alike. For each kind of step
(the octave of its tokens; decodes alone, prompts alone, or both) it keeps A = sum w x x' / t^2 and b = sum w x / t, and
the coefficients minimise u'(sum A)u - 2(sum b)'u under u >= 0.

A kind's own steps fade it with a memory of about 200 of them. Those of other kinds fade it, too, as devices change, but
never below KEPT_STEPS: a night of decodes does not make anybody forget what a prompt costs.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.steptime.borrowed import Borrowed
from vllm_sarathi.core.steptime.drift import CHANGE_FACTOR, SLOWER_STEPS, DriftDetector
from vllm_sarathi.core.steptime.features import (
    FIRST_SLOPE,
    HYBRID,
    KNOTS,
    SCALES,
    SEGMENTS,
    SIZE,
    WORK,
    Curve,
    Numbers,
    features,
    numbers,
)
from vllm_sarathi.core.steptime.margin import Margin
from vllm_sarathi.core.steptime.nonnegative import nonnegative_least_squares
from vllm_sarathi.core.steptime.tiles import CANDIDATES, TileFinder, padded
from vllm_sarathi.core.types import StepShape

FORGETTING = 0.995
"""Weight of a step against the one after it: the memory is about 200 steps."""

KEPT_STEPS = 32.0
"""What is known of a kind of step never counts for less than this number of its steps, whatever else is seen."""

RIDGE = 1e-7
HYBRID_RIDGE = 1e-3
"""Relative to all that was seen. The larger one is that of h: where all steps hold prefill nothing else tells h from c,
and decodes alone must not be thought cheaper than they are."""

SMOOTHNESS = 3e-6
"""Relative to all that was seen: neighbouring slopes are alike unless steps say otherwise, so that a segment in which
nothing was seen continues the one before it."""

HUBER = 2.0
"""Residuals above this multiple of the usual one count by their size, not its square (Huber, 1964)."""

FAMILIAR_STEPS = 8
"""A surprise in a kind of step seen less often than this is a lesson; later it may be an outlier."""

TELLING_STEPS = 3
"""Steps of a kind after which a residual says something of the next one's."""

PRIOR_STEPS = 20.0
"""What an earlier run learnt counts as much as this number of steps of this one."""

PRIOR_CHECKED_STEPS = 64
"""For this number of steps every kind of step tells whether the device is as it was, also one that was rarely seen."""

EAGER_STEPS = 64
SOLVE_EVERY_STEPS = 4
DECODES_ALONE_COUNT = 1 / 16
"""The coefficients are solved for anew in each of the first steps and after a change; then now and then. Steps of
decodes alone are much like one another, and count for that much of one."""

COMPARE_EVERY_STEPS = 64
"""While only decodes run, what they say of steps with prefill is taken over at this interval, and with each change."""

Kind = tuple[int, int]
"""The octave of a step's tokens; 0 for decodes alone, 1 for both, 2 for prompts alone."""

Sums = tuple[NDArray[np.float64], NDArray[np.float64], float]
"""A, b and the weight of the steps in them; shapes [SIZE, SIZE], [SIZE] and a number."""


def _smoothness() -> NDArray[np.float64]:
    """Return the quadratic form of the differences of neighbouring slopes, in scaled units; shape [SIZE, SIZE]."""
    rows = np.zeros((SEGMENTS - 1, SIZE))
    for i in range(SEGMENTS - 1):
        rows[i, FIRST_SLOPE + i], rows[i, FIRST_SLOPE + i + 1] = -1.0, 1.0
    return rows.T @ rows


_SMOOTHNESS = SMOOTHNESS * _smoothness()
_RIDGES = np.full(SIZE, RIDGE)
_RIDGES[FIRST_SLOPE : FIRST_SLOPE + SEGMENTS] = (
    1e-10  # one that nothing was seen of is not zero but its neighbour's
)
_RIDGES[HYBRID] = HYBRID_RIDGE
_REGULAR = np.diag(_RIDGES) + _SMOOTHNESS
_SCALES = np.array(SCALES)


class StepTimeModel:
    """Predicts a step's seconds, learns from its measured seconds, and knows how far it is off.

    Args:
        attainment: the share of gaps between tokens that is to be kept.
    """

    def __init__(self, attainment: float = 0.99) -> None:
        self.steps = 0
        self._margin = Margin(attainment)
        self._drift = (DriftDetector(), DriftDetector())
        self._tiles = TileFinder()
        self._sums: dict[Kind, Sums] = {}
        self._unabsorbed: dict[Kind, list[tuple[Numbers, tuple[float, float, float]]]] = {}
        self._u: NDArray[np.float64] = np.zeros(SIZE)
        self._curve = Curve([0.0] * SIZE)
        self._spread = 0.1
        self._seen: dict[tuple[int, int], int] = {}
        self._kinds_seen: dict[Kind, int] = {}
        self._eager_steps = EAGER_STEPS
        self._until_solve = float(SOLVE_EVERY_STEPS)
        self._unchecked_steps = 0
        self._prior_steps = 0
        self._borrowed = (Borrowed(), Borrowed())
        self._doubted = [False, False]

    @property
    def tile_tokens(self) -> int:
        """The tokens of a tile, as far as the device has shown it; 1 for none."""
        return self._tiles.tile_tokens

    @property
    def ready(self) -> bool:
        """True once anything has been learnt, and a prior has been compared with enough steps to see it fail."""
        return self.steps > 0 and self._unchecked_steps <= 0

    @property
    def margin(self) -> float:
        """The factor on a prediction that covers the stated share of the gaps; see `margin`."""
        return self._margin.factor

    @property
    def decode_margin(self) -> float:
        """The same for steps of decodes alone."""
        return self._margin.alone

    @property
    def relative_error(self) -> float:
        """The usual relative error of a prediction (a robust standard deviation)."""
        return self._spread

    @property
    def work_s(self) -> float:
        """Seconds of attention per token pair of a prompt."""
        return self._curve.coefficients[WORK]

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature, in the order of `features`."""
        return tuple(self._curve.coefficients)

    def predict(self, shape: StepShape) -> float:
        """Return the expected seconds of a step; 0 before anything has been learnt."""
        return self._curve.predict(shape, self._tiles.tile_tokens)

    def seconds(
        self, tokens: float, decodes: int, context: int, work: float, sequences: int, encoder: int = 0
    ) -> float:
        """`predict` for bare numbers: the budget search calls it a dozen times in every step."""
        tokens = padded(tokens, self._tiles.tile_tokens)
        return self._curve.seconds(tokens, decodes, context, work, sequences, encoder)

    def observe(self, shape: StepShape, measured_s: float) -> None:
        """Learn from a step; a time that is not finite and above zero (a broken clock) is passed over."""
        if not math.isfinite(measured_s) or measured_s <= 0.0:
            return
        self._margin.saw(shape)
        self._compare(shape, measured_s)
        predicted_s = self.predict(shape)
        weight = self._weight(shape, measured_s, predicted_s) if predicted_s > 0 else 1.0
        if self._tiles.observe(shape, measured_s):
            self._fade(0.2)  # what was learnt by the old count of tokens is worth less now
        # Relative to what was predicted: relative to the measured time, noise would pull the fit down.
        weight_a = weight / max(predicted_s, 0.5 * measured_s) ** 2
        row = numbers(shape, self._tiles.tile_tokens), (weight_a, weight_a * measured_s, weight)
        self._unabsorbed.setdefault(_kind(shape), []).append(row)
        self._unchecked_steps -= 1
        self.steps += 1
        self._eager_steps -= 1
        self._until_solve -= DECODES_ALONE_COUNT if shape.prefill_work <= 0 else 1.0
        if self._eager_steps > 0 or self._until_solve <= 0:
            self._solve()

    def _compare(self, shape: StepShape, measured_s: float) -> None:
        """Let the steps of one kind tell how slow the device is while there are none of the other; see `borrowed`."""
        prefill = shape.sequences > shape.decodes
        self._scale(prefill, self._borrowed[prefill].saw_own())
        if self._kinds_seen.get(_kind(shape), 0) >= FAMILIAR_STEPS:
            # Before, nothing is known that they could have become slower than.
            self._borrowed[not prefill].saw_other(self._curve, self.tile_tokens, shape, measured_s)
            if not prefill and self.steps % COMPARE_EVERY_STEPS == 0:
                self._absorb()
                self._scale(True, self._borrowed[True].follow(changed=False))

    def _absorb(self) -> None:
        """Add the latest steps to the sums: some at once, as that costs hardly more than one."""
        if not self._unabsorbed:
            return
        arrived = sum(len(rows) for rows in self._unabsorbed.values())
        for kind, rows in self._unabsorbed.items():
            a, b, weight = self._sums.get(kind, (np.zeros((SIZE, SIZE)), np.zeros(SIZE), 0.0))
            count = len(rows)
            x = features([of for of, _ in rows]) * _SCALES
            weights_a, weights_b, weights = np.array([weights for _, weights in rows]).T
            fading = FORGETTING ** np.arange(count - 1, -1, -1)
            kept = FORGETTING**count
            self._sums[kind] = (
                kept * a + (x.T * (fading * weights_a)) @ x,
                kept * b + (fading * weights_b) @ x,
                kept * weight + float(fading @ weights),
            )
        for kind, (a, b, weight) in self._sums.items():
            others = arrived - len(self._unabsorbed.get(kind, ()))
            if others and weight > KEPT_STEPS:
                kept = max(FORGETTING**others, KEPT_STEPS / weight)
                self._sums[kind] = (kept * a, kept * b, kept * weight)
        self._unabsorbed.clear()

    def _weight(self, shape: StepShape, measured_s: float, predicted_s: float) -> float:
        """Note the residual, and return how much the step is to count."""
        ratio = measured_s / predicted_s
        familiarity = _familiarity(shape)
        seen = self._seen.get(familiarity, 0)
        self._seen[familiarity] = seen + 1
        prefill = shape.sequences > shape.decodes
        drift = self._drift[prefill]
        passed_over = seen >= FAMILIAR_STEPS and drift.passes_over(ratio)
        if seen >= TELLING_STEPS and not passed_over:
            self._margin.observe(shape, predicted_s, ratio, seen >= FAMILIAR_STEPS)
        self._prior_steps -= 1
        kind = _kind(shape)
        self._kinds_seen[kind] = self._kinds_seen.get(kind, 0) + 1
        if self._kinds_seen[kind] <= TELLING_STEPS and self._prior_steps < 0:
            return 1.0
        if self.steps % SOLVE_EVERY_STEPS == 0 and (shape.prefill_work > 0 or self.steps % 64 == 0):
            self._margin.renew()
        factor = drift.look(ratio, self._doubted[prefill])
        if ratio >= 1 / CHANGE_FACTOR or factor is not None:
            self._doubted[prefill] = False
        if factor is not None:
            self._rescale(factor, shape, drift.change_steps)
            return 1.0
        if passed_over:
            return 0.0
        if seen < FAMILIAR_STEPS:
            return 1.0
        residual = abs(ratio - 1.0)
        self._spread += 0.02 * (1.25 * min(residual, 4 * self._spread) - self._spread)
        self._spread = max(self._spread, 1e-3)
        return min(1.0, HUBER * self._spread / residual) if residual > 0 else 1.0

    def _rescale(self, factor: float, shape: StepShape, steps: int) -> None:
        """Let what is known follow a device that has changed: slower in everything, faster in what has shown it."""
        self._absorb()
        prefill = shape.sequences > shape.decodes
        self._scale(prefill, factor)
        others = self._borrowed[not prefill].follow(changed=True)
        self._scale(not prefill, others)
        self._doubted[not prefill] |= others > 1.0
        self._tiles.forget_steps()
        self._fade(0.2, changed=prefill)
        self._margin.changed(steps if prefill else 0)

    def _scale(self, prefill: bool, factor: float) -> None:
        """Let the kinds of steps with prefill, or those without, take `factor` times as long as they did."""
        if factor == 1.0:
            return
        for kind, (a, b, weight) in self._sums.items():
            if (kind[1] > 0) == prefill:
                self._sums[kind] = (a, factor * b, weight)

    def _fade(self, share: float, changed: bool | None = None) -> None:
        """Let what is to come count for more than what was learnt.

        Args:
            share: of the weight that stays.
            changed: whether it was steps with prefill that have changed; of the others KEPT_STEPS stay. None for all.
        """
        self._absorb()
        for kind, (a, b, weight) in self._sums.items():
            spared = changed is not None and (kind[1] > 0) != changed and weight > 0
            kept = max(share, min(1.0, KEPT_STEPS / weight)) if spared else share
            self._sums[kind] = (kept * a, kept * b, kept * weight)
        self._eager_steps = EAGER_STEPS

    def _solve(self) -> None:
        """Find the coefficients, from the last solution on (block principal pivoting)."""
        self._until_solve = float(SOLVE_EVERY_STEPS)
        self._absorb()
        a = np.add.reduce([sums[0] for sums in self._sums.values()])
        b = np.add.reduce([sums[1] for sums in self._sums.values()])
        a = a + _REGULAR * (1e-12 + float(np.trace(a)))
        self._u = nonnegative_least_squares(a, b, self._u > 0)
        self._curve = Curve((self._u * _SCALES).tolist())

    def to_mapping(self) -> dict[str, Any]:
        """Return what was learnt as plain values; `load` takes them back."""
        self._absorb()
        return {
            "knots": list(KNOTS),
            "tile": self.tile_tokens,
            "kinds": [
                {"kind": list(kind), "a": a.tolist(), "b": b.tolist(), "weight": weight}
                for kind, (a, b, weight) in self._sums.items()
            ],
            "spread": self._spread,
            "familiar": [list(kind) for kind, seen in self._seen.items() if seen >= FAMILIAR_STEPS],
        }

    def load(self, values: Mapping[str, Any]) -> None:
        """Take over what an earlier run learnt, as a prior worth PRIOR_STEPS steps of each kind.

        The kinds of step that were familiar then are so now: where their times surprise, the device has changed, and
        the prior is rescaled. Until enough steps have been seen for that to show, the model is not `ready`.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of this model; it is as it was.
        """
        spread, tile = float(values["spread"]), int(values["tile"])
        familiar = [(int(tokens), int(prefix)) for tokens, prefix in values["familiar"]]
        if tile not in CANDIDATES or list(values["knots"]) != list(KNOTS):
            raise ValueError("it was learnt by a model of another shape")
        sums = dict(_checked_sums(kind) for kind in values["kinds"])
        if not sums or not 0 < spread < math.inf:
            raise ValueError("its numbers are not those of a step model")
        self._unabsorbed.clear()
        self._sums = sums
        self._spread = min(max(spread, 1e-3), 1.0)
        self._seen = dict.fromkeys(familiar, FAMILIAR_STEPS)
        self._tiles.tile_tokens = tile
        self._margin.changed(0)
        self._unchecked_steps = SLOWER_STEPS
        self._prior_steps = PRIOR_CHECKED_STEPS
        self.steps = 1
        self._solve()


def _checked_sums(values: Mapping[str, Any]) -> tuple[Kind, Sums]:
    """Return one kind's sums out of plain values, faded to PRIOR_STEPS; see `StepTimeModel.load`."""
    octave, company = (int(part) for part in values["kind"])
    a, b = np.array(values["a"], dtype=float), np.array(values["b"], dtype=float)
    weight = float(values["weight"])
    if a.shape != (SIZE, SIZE) or b.shape != (SIZE,):
        raise ValueError("it was learnt by a model of another shape")
    # A sum of outer products is symmetric and has no negative eigenvalue, but for rounding.
    if (
        not (np.isfinite(a).all() and np.isfinite(b).all() and 0 < weight < math.inf)
        or (b < 0).any()
        or not np.allclose(a, a.T)
        or float(np.linalg.eigvalsh(a)[0]) < -1e-9 * float(np.trace(a))
    ):
        raise ValueError("its numbers are not those of a step model")
    share = min(1.0, PRIOR_STEPS / weight)
    return (octave, company), (share * a, share * b, share * weight)


def _kind(shape: StepShape) -> Kind:
    company = 0 if shape.sequences == shape.decodes else 1 if shape.decodes else 2
    return shape.tokens.bit_length(), company


def _familiarity(shape: StepShape) -> tuple[int, int]:
    """Return a coarse name of what a step is like: the octave of its tokens, and of its prefixes."""
    return shape.tokens.bit_length(), int(shape.prefill_work / max(1, shape.tokens)).bit_length()
