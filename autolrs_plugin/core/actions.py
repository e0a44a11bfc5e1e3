"""What the controller asks of a run, and what the run answers: the seam between deciding and training.

One action at a time: `Controller.next()` gives it, the session carries it out, `Controller.tell()` takes its
result. Actions and results are plain values, so a journal of them is the whole state of the search.
Learning rates are those of the first parameter group; the other groups keep their ratio to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Keep the whole state of the run, in place of the one kept before."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Train on minibatches of the probe's own, from the kept state; every probe starts with a restore.

    Attributes:
        stage: which search this is, from 0.
        index: which probe of it, from 0.
        lrs: the learning rate of each step.
        abort_above: a training loss above this ends the probe at once, and so do two in succession that are not finite.
        evaluate: whether to evaluate the validation loss after the last step.
        draw: which draw of minibatches: two probes of a stage with the same draw see the same ones, so that
            their losses differ by the learning rate and not by the data. (stage, draw) seeds the minibatches.
    """

    stage: int
    index: int
    lrs: tuple[float, ...]
    abort_above: float
    evaluate: bool
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Restore:
    """Go back to the kept state, bit for bit, and continue from there."""


@dataclass(frozen=True, slots=True)
class Train:
    """Train on the run's own stream of data.

    Attributes:
        first_step: how many real steps have been taken before, from 0.
        lrs: the learning rate of each step.
    """

    first_step: int
    lrs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the validation loss; nothing of the run changes by it.

    Attributes:
        step: how many real steps have been taken.
    """

    step: int


@dataclass(frozen=True, slots=True)
class Done:
    """The run is complete, on weights that were really trained."""


MOST_LOSS = 1e100
"""A loss that is greater, or far below zero, counts as infinite: squares of it could not be reckoned with."""

Action: TypeAlias = Snapshot | Probe | Restore | Train | Evaluate | Done


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an action.

    Losses beyond MOST_LOSS become infinite.

    Attributes:
        losses: the training loss of each step taken; fewer than asked for where a probe was ended early.
        val_loss: the validation loss, where it was evaluated.
        seconds: wall time of the whole action.
        eval_seconds: how much of `seconds` went into the evaluation.
        restore_seconds: how much of `seconds` went into restoring the kept state before a probe.
        tokens: tokens (or samples) trained on, where the run counts them.
        stopped: whether a probe was left because the process was asked for something else; it decides nothing.
    """

    losses: tuple[float, ...] = ()
    val_loss: float | None = None
    seconds: float = 0.0
    eval_seconds: float = 0.0
    restore_seconds: float = 0.0
    tokens: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        # The one place where a frozen field is set.
        object.__setattr__(self, "losses", tuple(map(_bounded, self.losses)))
        if self.val_loss is not None:
            object.__setattr__(self, "val_loss", _bounded(self.val_loss))


def _bounded(loss: float) -> float:
    return math.copysign(math.inf, loss) if abs(loss) > MOST_LOSS else loss


def ends(losses: Sequence[float], above: float) -> bool:
    """Tell whether a probe ends on the last of these losses.

    Weights that are not finite have no finite loss any more; so one such loss may be that of a minibatch alone.
    """
    return losses[-1] > above or (len(losses) > 1 and not any(abs(loss) <= MOST_LOSS for loss in losses[-2:]))
