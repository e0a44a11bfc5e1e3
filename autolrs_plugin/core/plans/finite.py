"""Finite: a run none of whose losses is finite ends with an error, and within a chunk."""

import math
from collections.abc import Sequence

LOST_FOR_GOOD = 12
"""The number of losses that are not finite, a whole chunk among them, that ends the run with an error."""


class NotFiniteError(ValueError):
    """A run whose losses are not finite, whatever the learning rate."""


class Finite:
    """Counts the losses at the end of a run that are not finite."""

    def __init__(self, chunk_steps: int) -> None:
        self._most = max(LOST_FOR_GOOD, min(chunk_steps, 50))
        self._bad_losses = 0

    def check(self, losses: Sequence[float], first: int, rate: float) -> None:
        """Take in a chunk of losses from `first` on at a rate; raise NotFiniteError if it is one too many."""
        bad = [not math.isfinite(loss) for loss in losses]
        self._bad_losses = self._bad_losses + len(bad) if all(bad) else bad[::-1].index(False)
        if all(bad) and self._bad_losses >= self._most:
            raise NotFiniteError(
                f"train_step: none of the last {self._bad_losses} losses up to step {first + len(bad)} is finite "
                f"(learning rate {rate:.3g}), so there is nothing to decide by; it must return the training loss."
            )
