"""Bracket: the second stage, three long probes around the present rate.

After a tenth of a run, and in probes of a twentieth of it, the best rate of probes is about that of the rest of the
run: shorter or earlier ones favour higher rates, later ones lower rates (docs/explanation/what-lost.md). So this is
where the rate is settled. The probes are at the present rate, UP times that, and on the side where it falls: UP^2 times
the rate if UP was better, else DOWN times it.

How much short probes favour high rates differs with the optimizer, and shows in the two stages: where the best rate has
fallen from the first to the second, it goes on falling. `fallen` says by how much the rate is to follow.
"""

import math
from collections.abc import Sequence

from autolrs_plugin.core.plans.probing import Tried, losses_of

UP, DOWN = 2.5, 0.4
PROBES = 3

LEAST_SHARE = 0.025
"""Probes that are a lesser share of the run do not tell enough."""

USUAL_FALL, FOLLOWS, MOST_FALL = 0.25, 0.4, 0.3
"""Decades by which the best rate falls between the stages at no consequence, the share of the rest that the rate
follows by, and the most."""

BESIDE = 0.08
"""Decades: a probe that much above the best rate has seen that higher rates are worse."""


def bracket_rates(done: Sequence[Tried], present: float, count: int, low: float, high: float) -> list[float]:
    """Return the next rates to probe, `count` at most, within `low` and `high`; none once there are PROBES.

    Rates that are probed at a time are asked for without knowing what comes of them: then the last one is DOWN.
    """
    taken = [p.lr for p in done]
    held = [p for p in done if p.held]
    beyond = present
    if len(held) == 2 and held[1].lr > present:
        reference, up = losses_of(held)
        beyond = UP**2 * present if up < reference else present
    rates = [present, UP * present, beyond if beyond > present else DOWN * present]
    ahead = [lr for lr in rates if low <= lr <= high and lr not in taken]
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
