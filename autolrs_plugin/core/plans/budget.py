"""How a run's stages share the steps of the search."""

from collections.abc import Sequence

from autolrs_plugin.core.plans.extent import LEAST_STEPS
from autolrs_plugin.core.state import RunState

PARTS = (0.25, 0.75)
"""Each planned stage's part of the search's steps; what one leaves goes to the next."""

UNPLANNED = 0.25
"""Share of the search's steps that planned stages leave: for chunks to take back, and for unplanned stages."""


def left_for_planned(state: RunState) -> float:
    """Return the steps that planned stages may still take."""
    config = state.config
    return state.budget_left_steps - UNPLANNED * config.search_budget * config.max_steps


def planned_part(state: RunState, index: int, shares: Sequence[float]) -> float:
    """Return the steps of the planned stage `index` of those at `shares` of the run."""
    return left_for_planned(state) * PARTS[index] / sum(PARTS[index : len(shares)])


def unplanned_part(state: RunState, kind: str, chunk_steps: int) -> float:
    """Return the steps of an unplanned stage, where a chunk has `chunk_steps`.

    What is left may have to pay for a chunk that goes wrong after it. Where a run stalls, what a change takes is left:
    three chunks that are taken back, and a stage.
    """
    left = state.budget_left_steps
    if kind == "stall":
        return left - 3 * chunk_steps - 4 * LEAST_STEPS
    return max(left - chunk_steps, min(left, 4 * LEAST_STEPS))
