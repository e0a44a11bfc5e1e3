"""Horizon: the correction for short probes, which favour rates that are too high for the long run.

The best rate of short probes lies about half a decade above that of a whole run: docs/explanation/what-lost.md.
"""

import math

import numpy as np

HORIZON, HORIZON_STD = 0.5, 0.4
"""Decades by which probes from the first weights favour too high a rate, and up to as much again either way."""

PRIOR_STD = 0.5
"""Decades within which the prior pulls."""

HORIZON_LATER = 0.25
"""Decades, after a change and a climb: probes are as new to what they see, and longer."""


def long_run(short: float, prior: float | None) -> float:
    """Return the rate for the whole run, given the best one of probes from the first weights, and the prior's.

    The least of (x - s)^2 / 2 HORIZON_STD^2 + log(1 + ((x - prior) / PRIOR_STD)^2), in decades: a normal likelihood
    around s, and a prior with heavy tails, which far evidence overrules. s is HORIZON below the best probe's rate
    where that lies above the prior's. Without a prior it is s.
    """
    if prior is None:
        return float(10 ** (math.log10(short) - HORIZON))
    x0, x1 = math.log10(prior), math.log10(short)
    centre = max(x0, x1 - HORIZON) if x1 > x0 else x1
    x = np.linspace(min(x0, centre), max(x0, centre), 201)
    cost = (x - centre) ** 2 / (2 * HORIZON_STD**2) + np.log1p(((x - x0) / PRIOR_STD) ** 2)
    return float(10 ** x[int(np.argmin(cost))])


def after_a_change(short: float) -> float:
    """Return the rate for the rest of a run, given the best one of the probes after a change."""
    return float(10 ** (math.log10(short) - HORIZON_LATER))
