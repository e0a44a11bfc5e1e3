"""Extent: how many probes a stage takes, and how long they are.

Probes that are shorter than PROBE_SHARES rank rates by chance (docs/explanation/what-lost.md).
"""

from autolrs_plugin.core.config import AutoLRSConfig

GOOD_PROBES, MOST_PROBES = (2, 3), (5, 4)
"""Probes that a stage has room for if the budget allows it (two in any case), and the most that one takes."""

PROBES = {"warm start": (1,), "find": (5, 4, 3)}
"""The most probes of a stage; room is made for them, or for the next smaller number."""

PROBE_SHARES = (0.018, 0.06)
"""Length of a stage's probes, as shares of the run, where its part of the budget has room for them."""

LEAST_STEPS = 8
"""No probe is shorter."""

EVALUATION = 8.0
"""Probes are evaluated if that costs at most this part of them."""


def extent(config: AutoLRSConfig, kind: str, index: int, allotted: float) -> tuple[int, int, bool]:
    """Return the most probes of a stage, their steps (0 where there is no room), and whether they are evaluated.

    Args:
        kind: why the stage opens.
        index: which of the planned ones, or the one that it is like.
        allotted: the steps that it may take.
    """
    numbers = PROBES.get(kind, (GOOD_PROBES[index], 2))
    most = max(numbers) if kind in PROBES else MOST_PROBES[index]
    share = 1.0 if kind == "find" else PROBE_SHARES[index]
    for number in numbers:
        each = min(allotted / number, max(float(LEAST_STEPS), share * config.max_steps))
        evaluate = config.validation and EVALUATION * config.eval_cost_steps <= each
        steps = int(each - config.eval_cost_steps if evaluate else each)
        if steps >= LEAST_STEPS:
            return most, steps, evaluate
    return most, 0, False
