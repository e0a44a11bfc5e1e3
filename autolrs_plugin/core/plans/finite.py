"""Finite: a run none of whose losses is finite ends with an error, and within a chunk."""

import math
from collections.abc import Sequence

from autolrs_plugin.core.actions import MOST_LOSS
from autolrs_plugin.core.plans.training import diverged_above
from autolrs_plugin.core.state import RunState

LOST_FOR_GOOD = 12
"""The number of losses that are not finite, a whole chunk among them, that ends the run with an error."""


class NotFiniteError(ValueError):
    """A run whose losses are not finite, whatever the learning rate."""


class Finite:
    """Counts the losses at the end of a run that are not finite."""

    def __init__(self, state: RunState, chunk_steps: int) -> None:
        self._state = state
        self._most = max(LOST_FOR_GOOD, min(chunk_steps, 50))
        self._bad_losses = 0

    def check(self, losses: Sequence[float], first: int, rate: float) -> None:
        """Take in a chunk of losses from `first` on at a rate; raise NotFiniteError if it is one too many."""
        bad = [not math.isfinite(loss) for loss in losses]
        self._bad_losses = self._bad_losses + len(bad) if all(bad) else bad[::-1].index(False)
        if all(bad) and self._bad_losses >= self._most:
            raise NotFiniteError(
                f"train_step: none of the last {self._bad_losses} losses up to step {first + len(bad)} is finite "
                f"{not_finite_cause(self._state, rate)}"
            )


def not_finite_cause(state: RunState, rate: float) -> str:
    """Return what may be behind losses that are not finite for good, at a learning rate: the end of a sentence."""
    low, high = state.config.lr_range
    finite = [loss for loss in state.losses if math.isfinite(loss)]
    if finite and rate <= low * 1.001 and finite[-1] > diverged_above(finite[0]):
        return (
            f"at a learning rate of {rate:.3g}, the lowest of lr_range=({low:g}, {high:g}), and losses had risen "
            "before; so that range is too high: give one with a lower end."
        )
    return (
        f"(learning rate {rate:.3g}; a loss beyond {MOST_LOSS:g} counts as infinite), so there is nothing to decide "
        "by; it must return the training loss."
    )
