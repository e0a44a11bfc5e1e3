"""What the time of a step is a sum of.

    t(shape) = c + sum_i s_i tokens_i + d decodes + e context + f work + g prefills + h [prefills > 0]
             + j [decodes > 0] + k encoder tokens

`tokens_i` is the part of the step's tokens that lies between KNOTS[i] and KNOTS[i + 1], and s_i >= 0 the time of one
of them: any rising curve of the tokens. It may be convex (reading the weights takes longer than computing, then it is
the other way round; a roofline, as in Sarathi-Serve, arXiv 2403.02310, section 3.1) or concave (in a mixture of
experts each of the first tokens wakes more experts), or first the one and then the other. h is what it costs that
there is any prefill at all: other kernels run then. j is what decoding costs beside the tokens: drafting, sampling.
"""

from collections.abc import Sequence

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

_SPANS = tuple(zip(KNOTS, (*KNOTS[1:], float("inf")), strict=True))


def features(shape: StepShape, tile_tokens: int = 1) -> list[float]:
    """Return the step's features, unscaled, in the order of the coefficients; shape [SIZE]."""
    tokens, prefills = padded(shape.tokens, tile_tokens), shape.sequences - shape.decodes
    return [
        1.0,
        *[float(min(tokens, end) - start) if tokens > start else 0.0 for start, end in _SPANS],
        float(shape.decodes),
        float(shape.decode_context_tokens),
        shape.prefill_work,
        float(prefills),
        float(prefills > 0),
        float(shape.decodes > 0),
        float(shape.encoder_tokens),
    ]


def seconds(
    c: Sequence[float],
    tokens: float,
    decodes: int,
    context: int,
    work: float,
    sequences: int,
    encoder: int = 0,
) -> float:
    """Return the product of the coefficients `c` with the features, without building them: see `features`.

    Args:
        c: seconds per unit of each feature, shape [SIZE].
        tokens: the step's tokens, in whole tiles.
        decodes, context, work, sequences, encoder: as in StepShape.
    """
    total = c[CONSTANT] + c[WORK] * work
    if decodes > 0:
        total += c[DECODES] * decodes + c[CONTEXT] * context + c[DECODING]
    if sequences > decodes:
        total += c[PREFILLS] * (sequences - decodes) + c[HYBRID]
    if encoder:
        total += c[ENCODER] * encoder
    index = FIRST_SLOPE
    for start, end in _SPANS:
        if tokens <= end:
            return total + c[index] * (tokens - start) if tokens > start else total
        total += c[index] * (end - start)
        index += 1
    return total
