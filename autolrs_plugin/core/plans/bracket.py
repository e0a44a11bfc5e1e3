"""Bracket: the second stage, three long probes around the present rate.

After a tenth of a run, and in probes of a twentieth of it, the best rate of probes is about that of the rest of the
run: shorter or earlier ones favour higher rates, later ones lower rates (docs/explanation/what-lost.md). So this is
where the rate is settled. The probes are at the present rate, UP times that, and on the side where the loss falls: UP^2
times the rate if UP was better, else DOWN times it. Where the present rate gains nothing, it is the other way round.

How much short probes favour high rates differs with the optimizer, and shows in the two stages: where the best rate has
fallen from the first to the second, it goes on falling. `fallen` says by how much the rate is to follow.
"""

import math
from collections.abc import Sequence

from autolrs_plugin.core.plans.probing import Tried, losses_of

UP, DOWN = 2.5, 0.4
PROBES = 3

FAR = 1.2
"""Decades: a best rate that far away would not be seen by these probes, nor by their outermost one."""

LEAST_SHARE = 0.025
"""Probes that are a lesser share of the run do not tell enough."""

USUAL_FALL, FOLLOWS, MOST_FALL = 0.25, 0.4, 0.3
"""Decades by which the best rate falls between the stages at no consequence, the share of the rest that the rate
follows by, and the most."""

BESIDE = 0.08
"""Decades: a probe that much above the best rate has seen that higher rates are worse."""


def bracket_rates(
    done: Sequence[Tried], present: float, count: int, low: float, high: float, downwards: bool = False
) -> list[float]:
    """Return the next rates to probe, `count` at most, within `low` and `high`; none once there are PROBES.

    Rates that are probed at a time are asked for without knowing what comes of them: then they lie on both sides.

    Args:
        done: the stage's probes so far.
        present: the rate in use, which the first one is at.
        count: how many rates are to be returned at most.
        low: the least rate.
        high: the greatest.
        downwards: whether the second probe lies below the first.
    """
    downwards = done[1].lr < present if len(done) > 1 else downwards
    step, back = (DOWN, UP) if downwards else (UP, DOWN)
    third = step**2 if _second_is_better(done) else back
    return _next_of([present, step * present, third * present], done, count, low, high)


def far_rates(
    done: Sequence[Tried], present: float, far: float, count: int, low: float, high: float
) -> list[float]:
    """Return the next rates to probe where an earlier stage spoke for a rate that is `far` from the present one.

    The third one lies between: a little below the far one if that was better, else halfway. See `bracket_rates`.
    """
    between = DOWN**2 * far if far > present else UP**2 * far
    third = between if _second_is_better(done) else math.sqrt(present * far)
    return _next_of([present, far, third], done, count, low, high)


def _second_is_better(done: Sequence[Tried]) -> bool:
    if len(done) != 2 or not all(p.held for p in done):
        return False
    first, second = losses_of(done)
    return bool(second < first)


def _next_of(
    rates: Sequence[float], done: Sequence[Tried], count: int, low: float, high: float
) -> list[float]:
    taken = [p.lr for p in done]
    # During the warm-up, the present rate may lie below the range.
    ahead = [lr for lr in rates if (low <= lr <= high or lr == rates[0]) and lr not in taken]
    return ahead[: min(count, PROBES - len(done))]


def fallen(first: float | None, best: float, held: Sequence[float]) -> float:
    """Return the decades by which the rate is to be lower than the `best` one of the bracket.

    Args:
        first: the best rate of the first stage's probes, if there were any.
        held: rates of the bracket's probes that held.
    """
    if first is None or not any(math.log10(lr / best) > BESIDE for lr in held):
        return 0.0
    return min(MOST_FALL, FOLLOWS * max(0.0, math.log10(first / best) - USUAL_FALL))
