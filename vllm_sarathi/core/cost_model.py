"""CostModel: how long a step of this shape takes, learnt from the steps as they happen.

Notation (a roofline, as in Sarathi-Serve, arXiv 2403.02310, section 3.1):

    t(shape) = c + sum_k a_k max(0, tokens - k) + d decodes + e context + f work + g prefills + h [prefills > 0]

where prefills = sequences - decodes, and h is what it costs that there is any prefill at all: other kernels run
then, on a CPU above all. The tokens count in whole tiles, once the device has shown that it computes in tiles (see
`tiles`). The hinges at KNEES make the cost of the linear layers any convex, rising curve of the tokens: flat while
reading the weights takes longer than computing, linear after. All coefficients are held at or above zero, since no
part of a step can take negative time. The fit is least squares of the *relative* error with exponential
forgetting: a 40 ms step and a 4 s step count alike. With A = sum w x x' / t^2 and b = sum w x / t, the
coefficients minimise u'Au - 2b'u under u >= 0.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.nonnegative import nonnegative_least_squares
from vllm_sarathi.core.tiles import CANDIDATES, TileFinder, padded
from vllm_sarathi.core.views import StepShape

KNEES = (0, 32, 64, 128, 256, 512, 1024)
SCALES = (1.0, *(0.01 for _ in KNEES), 0.1, 1e-4, 1e-6, 0.1, 1.0)
"""Factors that bring the features to about one, for the arithmetic's sake."""

FORGETTING = 0.995
"""Weight of a step against the one after it: the memory is about 200 steps."""

RIDGES = np.array((*(1e-7 for _ in SCALES[1:]), 1e-3))
"""Relative to all that was seen. The last one is h's: where all steps read prompts nothing else tells h from c, and
decodes alone must not be thought cheaper than they are."""

HUBER = 2.0
"""Residuals above so many times the usual one count by their size, not its square (Huber, 1964)."""

FAMILIAR_STEPS = 8
"""A surprise in a kind of step seen less often than this is a lesson; later it may be an outlier."""

TELLING_STEPS = 3
"""After so many of its kind a step's residual says something of the next one's."""

CHANGE_WINDOW = 8
CHANGE_FACTOR = 1.2
SLOWER_WINDOW = 4
SLOWER_FACTOR = 1.3
"""The device has changed where so many steps in a row were off by so much, all to the same side."""

PRIOR_STEPS = 20.0
"""What an earlier run learnt counts as much as so many steps of this one."""

RATIOS_KEPT = 256
ALIKE_NEEDED = 24
CAUTION = 0.15
CAUTIOUS_STEPS = 24
BIAS_STEPS = 128
MARGIN_RANGE = (1.0, 2.5)
"""A step that takes longer than the upper end is not the chunk's doing, and no chunk would have kept it."""

MISSES_PLANNED = 1 / 3
"""Where more hybrid steps may be late, so much of that is planned with; the rest is for what no step could tell."""

MOST_MISSES = 0.05
GAPS_ASSUMED = 1000.0
GAPS_FORGOTTEN = 0.999
"""All gaps are taken for those of hybrid steps at first, and the memory of which were is about 1,000 steps."""

GUARD_GAIN = 0.02
GUARD_MISSES = 0.015
GUARD_RUN_STEPS = 16
MOST_GUARD = 1.5
"""A hybrid step that outlasts the margin so soon after another raises it by the gain; each other step lowers it again,
by so little that the given share of misses balances (after adaptive conformal inference; Gibbs and Candes, 2021). The
residuals' quantile alone lags behind where they come in runs, as on a machine with neighbours."""

EAGER_STEPS = 64
SOLVE_EVERY_STEPS = 4
DECODES_ALONE_COUNT = 1 / 16
"""The coefficients are solved for anew in each of the first steps and after a change; then now and then. Steps of
decodes alone are much like one another, and count for that much of one."""


_NORMAL = NormalDist()


def features(shape: StepShape, tile_tokens: int = 1) -> list[float]:
    """Return the step's features, unscaled, in the order of the coefficients; shape [6 + len(KNEES)]."""
    tokens, prefills = padded(shape.tokens, tile_tokens), shape.sequences - shape.decodes
    return [
        1.0,
        *[float(tokens - knee) if tokens > knee else 0.0 for knee in KNEES],
        float(shape.decodes),
        float(shape.decode_context_tokens),
        shape.prefill_work,
        float(prefills),
        float(prefills > 0),
    ]


class CostModel:
    """Predicts a step's seconds, learns from its measured seconds, and knows how far it is off.

    Args:
        promised: the share of gaps between tokens that is to be kept.
    """

    def __init__(self, promised: float = 0.99) -> None:
        size = len(SCALES)
        self.promised = promised
        self._gaps = self._hybrid_gaps = GAPS_ASSUMED
        self.steps = 0
        self._scales = np.array(SCALES)
        self._unabsorbed: list[tuple[list[float], float, float]] = []
        self._a: NDArray[np.float64] = np.zeros((size, size))
        self._b: NDArray[np.float64] = np.zeros(size)
        self._u: NDArray[np.float64] = np.zeros(size)
        self._coefficients = [0.0] * size
        self._spread = 0.1
        self._recent: deque[float] = deque(maxlen=CHANGE_WINDOW)
        self._ratios: deque[tuple[float, float]] = deque(maxlen=RATIOS_KEPT)
        self._early_ratios: deque[tuple[float, float]] = deque(maxlen=ALIKE_NEEDED)
        self._guard = 1.0
        self._steps_since_miss = GUARD_RUN_STEPS
        self._margin = self._margin_now()
        self._hybrid_since_margin = False
        self._seen: dict[tuple[int, int], int] = {}
        self._eager_steps = EAGER_STEPS
        self._until_solve = float(SOLVE_EVERY_STEPS)
        self._weight_sum = 0.0
        self._unchecked_steps = 0
        self._tiles = TileFinder()

    @property
    def tile_tokens(self) -> int:
        """The tokens of a tile, as far as the device has shown it; 1 for none."""
        return self._tiles.tile_tokens

    @property
    def ready(self) -> bool:
        """True once anything has been learnt, and a prior has been compared with enough steps to see it fail."""
        return self.steps > 0 and self._unchecked_steps <= 0

    @property
    def quantile(self) -> float:
        """The share of hybrid steps that `margin` is to cover.

        The promise is to all gaps, and those of steps without prefill keep it by themselves: the fewer gaps are in
        hybrid steps, the more of those steps may be late.
        """
        spread_out = MISSES_PLANNED * self._gaps / max(self._hybrid_gaps, 1e-9)
        return 1.0 - min(MOST_MISSES, (1.0 - self.promised) * max(1.0, spread_out))

    @property
    def margin(self) -> float:
        """The factor on a prediction that covers `quantile` of the hybrid steps, from their latest residuals.

        Decodes alone are foretold better, and no chunk depends on it.
        """
        return self._margin * self._guard

    @property
    def relative_error(self) -> float:
        """The usual relative error of a prediction (a robust standard deviation)."""
        return self._spread

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature, in the order of `features`."""
        return tuple(self._coefficients)

    def predict(self, shape: StepShape) -> float:
        """Return the expected seconds of a step; 0 before anything has been learnt."""
        return self.seconds(
            shape.tokens, shape.decodes, shape.decode_context_tokens, shape.prefill_work, shape.sequences
        )

    def seconds(self, tokens: float, decodes: int, context: int, work: float, sequences: int) -> float:
        """`predict` for bare numbers: the budget search calls it a dozen times in every step."""
        c = self._coefficients
        tokens = padded(tokens, self._tiles.tile_tokens)
        total = c[0] + c[-5] * decodes + c[-4] * context + c[-3] * work
        prefills = sequences - decodes
        if prefills > 0:
            total += c[-2] * prefills + c[-1]
        for i, knee in enumerate(KNEES, start=1):
            if tokens <= knee:
                break
            total += c[i] * (tokens - knee)
        return total

    def observe(self, shape: StepShape, measured_s: float) -> None:
        """Learn from a step; a time that is not finite and above zero (a broken clock) is passed over."""
        if not math.isfinite(measured_s) or measured_s <= 0.0:
            return
        self._gaps = GAPS_FORGOTTEN * self._gaps + shape.decodes
        self._hybrid_gaps *= GAPS_FORGOTTEN
        if shape.sequences > shape.decodes:
            self._hybrid_gaps += shape.decodes
        predicted_s = self.predict(shape)
        weight = self._weight(shape, measured_s, predicted_s) if predicted_s > 0 else 1.0
        if self._tiles.observe(shape, measured_s):
            self._forget()  # what was learnt by the old count of tokens is worth less now
        # Relative to what was foretold: relative to the measured time, noise would pull the fit down.
        weight_a = weight / max(predicted_s, 0.5 * measured_s) ** 2
        self._unabsorbed.append((features(shape, self._tiles.tile_tokens), weight_a, weight_a * measured_s))
        self._weight_sum = FORGETTING * self._weight_sum + weight
        self._unchecked_steps -= 1
        self.steps += 1
        self._eager_steps -= 1
        self._until_solve -= DECODES_ALONE_COUNT if shape.prefill_work <= 0 else 1.0
        if self._eager_steps > 0 or self._until_solve <= 0:
            self._solve()

    def _absorb(self) -> None:
        """Add the latest steps to the sums: some at once, as that costs hardly more than one."""
        count = len(self._unabsorbed)
        if not count:
            return
        rows, weights_a, weights_b = zip(*self._unabsorbed, strict=True)
        self._unabsorbed.clear()
        x = np.array(rows) * self._scales
        fading = FORGETTING ** np.arange(count - 1, -1, -1)
        self._a *= FORGETTING**count
        self._b *= FORGETTING**count
        self._a += (x.T * (fading * weights_a)) @ x
        self._b += (fading * weights_b) @ x

    def _weight(self, shape: StepShape, measured_s: float, predicted_s: float) -> float:
        """Note the residual, and return how much the step is to count."""
        ratio = measured_s / predicted_s
        kind = _kind(shape)
        seen = self._seen.get(kind, 0)
        self._seen[kind] = seen + 1
        if seen >= TELLING_STEPS and ratio <= MARGIN_RANGE[1] and 0 < shape.decodes < shape.sequences:
            if seen >= FAMILIAR_STEPS:
                self._ratios.append((predicted_s, ratio))
            else:
                self._early_ratios.append((predicted_s, ratio))
            self._note_miss(ratio > self.margin)
            self._hybrid_since_margin = True
        if seen < FAMILIAR_STEPS:
            return 1.0
        if self._hybrid_since_margin and self.steps % SOLVE_EVERY_STEPS == 0:
            self._margin, self._hybrid_since_margin = self._margin_now(), False
        if self._device_has_changed(ratio):
            return 1.0
        residual = abs(ratio - 1.0)
        self._spread += 0.02 * (1.25 * min(residual, 4 * self._spread) - self._spread)
        self._spread = max(self._spread, 1e-3)
        return min(1.0, HUBER * self._spread / residual) if residual > 0 else 1.0

    def _note_miss(self, missed: bool) -> None:
        """Raise or lower the guard on the margin, after a hybrid step."""
        in_a_run = missed and self._steps_since_miss < GUARD_RUN_STEPS
        self._steps_since_miss = 0 if missed else self._steps_since_miss + 1
        step = 1.0 if in_a_run else -GUARD_MISSES
        self._guard = min(MOST_GUARD, max(1.0, self._guard + GUARD_GAIN * step))

    def _device_has_changed(self, ratio: float) -> bool:
        """Rescale everything where the latest steps agree that the device is faster or slower than it was."""
        self._recent.append(ratio)
        if 1 / CHANGE_FACTOR <= ratio <= CHANGE_FACTOR:
            return False  # the row ends with it, whatever was before
        latest = list(self._recent)
        full = len(latest) == CHANGE_WINDOW
        if len(latest) >= SLOWER_WINDOW and min(latest[-SLOWER_WINDOW:]) > SLOWER_FACTOR:
            latest = latest[-SLOWER_WINDOW:]  # promises are being missed: do not wait for more
        elif not full or (max(latest) >= 1 / CHANGE_FACTOR and min(latest) <= CHANGE_FACTOR):
            return False
        middle = sorted(latest)[len(latest) // 2]
        self._absorb()
        self._b *= middle
        self._tiles.forget_steps()
        self._forget()
        return True

    def _forget(self) -> None:
        """Let what is to come count for more than what was learnt."""
        self._absorb()
        self._a *= 0.2
        self._b *= 0.2
        self._weight_sum *= 0.2
        self._eager_steps = EAGER_STEPS
        self._recent.clear()
        self._ratios.clear()
        self._early_ratios = deque(maxlen=0)  # what was wrong once is not trusted early again
        self._guard = 1.0
        self._margin = self._margin_now()

    def _margin_now(self) -> float:
        """Return the residuals' quantile, the larger of two estimates.

        A normal distribution's, from the mean deviation, is steadier than the few largest of a sample; where the
        residuals' own tail is heavier, a quantile somewhat below the wanted one shows it. While residuals are few,
        a caution that fades.
        """
        low, high = MARGIN_RANGE
        seen = len(self._ratios) + len(self._early_ratios)
        caution = 1.0 + CAUTION * max(0.0, 1.0 - seen / CAUTIOUS_STEPS)
        if seen < 2:
            return max(low, caution)
        ordered = sorted(self._telling_ratios())
        count = len(ordered)
        quantile = self.quantile
        centre, tail = (ordered[int(q * (count - 1))] for q in (0.5, 1 - 3 * (1 - quantile)))
        deviation = sum([abs(ratio - centre) for ratio in ordered]) / count
        # Few steps that were quicker than foretold do not say that the next ones will be.
        centre = max(centre, 1.0 - (1.0 - centre) * min(1.0, count / BIAS_STEPS))
        normal = centre + _NORMAL.inv_cdf(quantile) * math.sqrt(math.pi / 2) * deviation
        return min(high, max(low, normal, tail, caution))

    def _telling_ratios(self) -> list[float]:
        """Return the residuals of the longer steps, where there are enough: those that a margin is wanted for.

        What disturbs a step often takes the same time whatever the step, so short ones are off by more of theirs.
        """
        kept = list(self._ratios)
        if len(kept) < ALIKE_NEEDED:
            kept += self._early_ratios
        longest_s = sorted(predicted_s for predicted_s, _ in kept)[-1 - len(kept) // 8]
        longer = [ratio for predicted_s, ratio in kept if predicted_s >= 0.5 * longest_s]
        return longer if len(longer) >= ALIKE_NEEDED else [ratio for _, ratio in kept]

    def _solve(self) -> None:
        """Minimise u'Au - 2b'u under u >= 0, from the last solution on (block principal pivoting)."""
        self._until_solve = float(SOLVE_EVERY_STEPS)
        self._absorb()
        a = self._a + np.diag(RIDGES * (1e-12 + float(np.trace(self._a))))
        self._u = nonnegative_least_squares(a, self._b, self._u > 0)
        self._coefficients = (self._u * self._scales).tolist()

    def to_mapping(self) -> dict[str, Any]:
        """Return what was learnt as plain values; `load` takes them back."""
        self._absorb()
        return {
            "knees": list(KNEES),
            "tile": self.tile_tokens,
            "a": self._a.tolist(),
            "b": self._b.tolist(),
            "weight": self._weight_sum,
            "spread": self._spread,
            "familiar": [list(kind) for kind, seen in self._seen.items() if seen >= FAMILIAR_STEPS],
        }

    def load(self, values: Mapping[str, Any]) -> None:
        """Take over what an earlier run learnt, as a prior worth PRIOR_STEPS steps.

        The kinds of step that were familiar then are so now: where their times surprise, the device has changed, and
        the prior is rescaled. Until enough steps have been seen for that to show, the model is not `ready`.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of this model; it is as it was.
        """
        a, b = np.array(values["a"], dtype=float), np.array(values["b"], dtype=float)
        weight, spread = float(values["weight"]), float(values["spread"])
        familiar = [(int(tokens), int(prefix)) for tokens, prefix in values["familiar"]]
        tile = int(values.get("tile", 1))
        size = len(SCALES)
        if (
            tile not in CANDIDATES
            or list(values["knees"]) != list(KNEES)
            or a.shape != (size, size)
            or b.shape != (size,)
        ):
            raise ValueError("it was learnt by a model of another shape")
        finite = (
            np.isfinite(a).all() and np.isfinite(b).all() and 0 < weight < math.inf and 0 < spread < math.inf
        )
        # A sum of outer products is symmetric and has no negative eigenvalue, but for rounding.
        if not finite or (b < 0).any() or not np.allclose(a, a.T):
            raise ValueError("its numbers are not those of a step model")
        if float(np.linalg.eigvalsh(a)[0]) < -1e-9 * float(np.trace(a)):
            raise ValueError("its numbers are not those of a step model")
        share = min(1.0, PRIOR_STEPS / weight)
        self._unabsorbed.clear()
        self._a, self._b, self._weight_sum = a * share, b * share, weight * share
        self._spread = min(max(spread, 1e-3), 1.0)
        self._seen = dict.fromkeys(familiar, FAMILIAR_STEPS)
        self._tiles.tile_tokens = tile
        self._early_ratios = deque(maxlen=0)
        self._unchecked_steps = SLOWER_WINDOW
        self.steps = 1
        self._solve()


def _kind(shape: StepShape) -> tuple[int, int]:
    """Return a coarse name of a step's kind: the octave of its tokens, and of its prefixes."""
    return shape.tokens.bit_length(), int(shape.prefill_work / max(1, shape.tokens)).bit_length()
