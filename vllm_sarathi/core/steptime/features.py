"""What the time of a step is a sum of.

    t(shape) = c + sum_i s_i tokens_i + d decodes + e context + f work + g prefills + h [prefills > 0]
             + j [decodes > 0] + k encoder tokens

`tokens_i` is the part of the step's tokens that lies between KNOTS[i] and KNOTS[i + 1], and s_i >= 0 the time of one
of them: any rising curve of the tokens. It may be convex (reading the weights takes longer than computing, then it is
the other way round; a roofline, as in Sarathi-Serve, arXiv 2403.02310, section 3.1) or concave (in a mixture of
experts each of the first tokens wakes more experts), or first the one and then the other. h is what it costs that
there is any prefill at all: other kernels run then. j is what decoding costs beside the tokens: drafting, sampling.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.steptime.tiles import padded
from vllm_sarathi.core.types import StepShape

KNOTS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Where the slope of the tokens' curve may change; the last segment has no end."""

SEGMENTS = len(KNOTS)
CONSTANT = 0
FIRST_SLOPE = 1
DECODES = FIRST_SLOPE + SEGMENTS
CONTEXT, WORK, PREFILLS, HYBRID, DECODING, ENCODER = range(DECODES + 1, DECODES + 7)
SIZE = ENCODER + 1

SCALES = (1.0, *(0.01 for _ in KNOTS), 0.1, 1e-4, 1e-6, 0.1, 1.0, 1.0, 1e-2)
"""Factors that bring the features to about one, for the arithmetic's sake; shape [SIZE]."""

_ENDS = (*KNOTS[1:], float("inf"))
_STARTS = np.array(KNOTS, dtype=float)
_WIDTHS = np.array(_ENDS) - _STARTS

Numbers = tuple[float, int, int, float, int, int]
"""Of a step: tokens in whole tiles, decodes, their context, prefill work, prefills, encoder tokens; see StepShape."""


def numbers(shape: StepShape, tile_tokens: int = 1) -> Numbers:
    """Return what a step's features follow from."""
    return (
        padded(shape.tokens, tile_tokens),
        shape.decodes,
        shape.decode_context_tokens,
        shape.prefill_work,
        shape.sequences - shape.decodes,
        shape.encoder_tokens,
    )


def features(steps: Sequence[Numbers] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the features of some steps, unscaled, in the order of the coefficients; shape [steps, SIZE]."""
    of = np.asarray(steps, dtype=float)
    tokens, decodes, context, work, prefills, encoder = of.T
    made = np.empty((len(of), SIZE))
    made[:, CONSTANT] = 1.0
    made[:, FIRST_SLOPE:DECODES] = np.clip(tokens[:, None] - _STARTS, 0.0, _WIDTHS)
    made[:, DECODES], made[:, CONTEXT], made[:, WORK] = decodes, context, work
    made[:, PREFILLS], made[:, HYBRID] = prefills, prefills > 0
    made[:, DECODING], made[:, ENCODER] = decodes > 0, encoder
    return made


class Curve:
    """What a step takes, by the coefficients of its features.

    Args:
        coefficients: seconds per unit of each feature, shape [SIZE].
    """

    __slots__ = ("_at_knots", "coefficients")

    def __init__(self, coefficients: Sequence[float]) -> None:
        self.coefficients = coefficients
        self._at_knots = [0.0]
        for index in range(SEGMENTS - 1):
            span = KNOTS[index + 1] - KNOTS[index]
            self._at_knots.append(self._at_knots[-1] + coefficients[FIRST_SLOPE + index] * span)

    def seconds(
        self, tokens: float, decodes: int, context: int, work: float, sequences: int, encoder: int = 0
    ) -> float:
        """Return the product of the coefficients with the features, without building them: see `features`.

        Args:
            tokens: the step's tokens, in whole tiles.
            decodes, context, work, sequences, encoder: as in StepShape.
        """
        c = self.coefficients
        segment = bisect_left(_ENDS, tokens)
        total = c[CONSTANT] + c[WORK] * work
        total += self._at_knots[segment] + c[FIRST_SLOPE + segment] * (tokens - KNOTS[segment])
        if decodes > 0:
            total += c[DECODES] * decodes + c[CONTEXT] * context + c[DECODING]
        if sequences > decodes:
            total += c[PREFILLS] * (sequences - decodes) + c[HYBRID]
        if encoder:
            total += c[ENCODER] * encoder
        return total

    def predict(self, shape: StepShape, tile_tokens: int = 1) -> float:
        """Return the same for a step, its tokens rounded up to whole tiles."""
        return self.seconds(
            padded(shape.tokens, tile_tokens),
            shape.decodes,
            shape.decode_context_tokens,
            shape.prefill_work,
            shape.sequences,
            shape.encoder_tokens,
        )
