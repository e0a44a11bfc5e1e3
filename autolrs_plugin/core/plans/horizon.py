"""Horizon: short probes favour rates that are too high for the long run; what to make of the best one of them.

By which figures the constants were chosen (design tasks, seed 0, N = 0.87 C):

* HORIZON: the best of probes of 0.04 N from the first weights against the best whole run: digits-deep 1.2e-2 and
  4e-3, digits-autoencoder 2e-3 and 8e-3, mnist-resnet 0.15 to 0.5 and 0.05. At 0.35 mnist-resnet began at 0.34.
* HORIZON_LATER (regret, three seeds): at 0.5 with the pull of the present rate digits-unfreeze came to 0.030 at the
  worst, digits-shift to 0.006; at 0 to 0.009 and 0.144; at 0.25 to 0.010 and -0.011.
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
