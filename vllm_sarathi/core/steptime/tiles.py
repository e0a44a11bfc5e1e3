"""The tile size of a device: the number of tokens that it computes at once.

A matrix product works in tiles of rows: a step of 257 tokens takes as long as one of 384 where the tile is 128
(Sarathi-Serve, arXiv 2403.02310, section 4.3: 257 tokens took a third longer than 256). A model that draws a line
through such stairs is off by half a tile, and half a tile is what a budget between two stairs gives away.

The tile is found from the times themselves: that candidate counts whose rounded-up tokens explain the latest steps
best, twice in a row, and clearly better than the one held so far.
"""

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.types import StepShape

CANDIDATES = (1, 32, 64, 128, 256)
STEPS_KEPT = 96
STEPS_NEEDED = 32
LOOK_EVERY_STEPS = 16
LOOK_AT_LEAST_EVERY_STEPS = 512
PATIENT_LOOKS = 24
"""After this number of looks each that finds nothing new doubles the time to the next, up to this: a look costs as much
as ten steps."""

CLEARLY = 0.5
"""A candidate takes over where its usual error is at most this share of the present one's."""

NEGLIGIBLE = 0.005
"""Where the usual error is below this share of a step there is nothing to explain."""


OUTLIER = 0.2
"""A step that is off by more is no more telling than one that is off by this."""


def padded(tokens: float, tile: int) -> float:
    """Return the tokens in whole tiles; fewer than one of them take a smaller tile, of the next power of two."""
    if tile == 1:
        return tokens
    if tokens <= tile:
        return min(tile, 1 << max(0, math.ceil(tokens) - 1).bit_length())
    return -(-tokens // tile) * tile


class TileFinder:
    """Finds the tile from steps with prefill work."""

    def __init__(self) -> None:
        self.tile_tokens = 1
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=STEPS_KEPT)
        self._until_look = STEPS_NEEDED
        self._look_every, self._looks = LOOK_EVERY_STEPS, 0
        self._last_best = 1

    def observe(self, shape: StepShape, measured_s: float) -> bool:
        """Take in a step; return True where it changed the answer."""
        if shape.prefill_work <= 0:
            return False
        self._steps.append((shape.tokens, shape.decode_context_tokens, shape.prefill_work, measured_s))
        self._until_look -= 1
        if self._until_look > 0:
            return False
        self._until_look = self._look_every
        return self._look()

    def forget_steps(self) -> None:
        """Drop the steps kept: the device has changed, and no line goes through old and new ones."""
        self._steps.clear()
        self._until_look = STEPS_NEEDED
        self._look_every, self._looks = LOOK_EVERY_STEPS, 0

    def _look(self) -> bool:
        steps = np.array(self._steps, dtype=float)
        errors = {tile: _usual_error(steps, tile) for tile in CANDIDATES}
        best = min(CANDIDATES, key=errors.__getitem__)
        present = errors[self.tile_tokens]
        again, self._last_best = best == self._last_best, best
        clearly = present >= NEGLIGIBLE and errors[best] <= CLEARLY * present
        self._looks += 1
        if not clearly and self._looks > PATIENT_LOOKS:
            self._look_every = min(2 * self._look_every, LOOK_AT_LEAST_EVERY_STEPS)
        if not clearly or not again:
            return False
        self.tile_tokens = best
        return True


def _usual_error(steps: NDArray[np.float64], tile: int) -> float:
    """Return the usual relative error of the best line through the steps, their tokens rounded up to whole tiles.

    Args:
        steps: tokens, context tokens, prefill work and seconds; shape [steps, 4].
    """
    tokens = np.array([padded(count, tile) for count in steps[:, 0]])
    columns = np.column_stack(
        [
            np.ones(len(steps)),
            tokens / 100,
            np.maximum(0, tokens - 256) / 100,
            steps[:, 1] / 1e4,
            steps[:, 2] / 1e6,
        ]
    )
    relative = columns / steps[:, 3:]
    solution = np.linalg.lstsq(relative, np.ones(len(steps)), rcond=None)[0]
    return float(np.minimum(np.abs(relative @ solution - 1.0), OUTLIER).mean())
