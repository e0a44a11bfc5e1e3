"""Least squares with no coefficient below zero, from the sums that an online fit keeps."""

import numpy as np
from numpy.typing import NDArray


def nonnegative_least_squares(
    a: NDArray[np.float64], b: NDArray[np.float64], passive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Minimise u'au - 2b'u under u >= 0 for a positive definite `a`.

    Args:
        a: shape [n, n]. b: shape [n].
        passive: first guess of which u are above zero; the last step's answer mostly still holds.

    Block principal pivoting (Kim and Park, 2011): exchange all that break the conditions at once, and one at a
    time when that does not get closer.
    """
    size = len(b)
    tolerance = 1e-9 * (1.0 + float(np.abs(b).max()))
    passive = passive.copy()
    best, patience = size + 1, 3
    u = np.zeros(size)
    for _ in range(50 + 10 * size):
        u = np.zeros(size)
        if passive.any():
            u[passive] = np.linalg.solve(a[np.ix_(passive, passive)], b[passive])
        wrong = np.where(passive, u < 0, (b - a @ u) > tolerance)
        count = int(wrong.sum())
        if count == 0:
            return u
        if count < best:
            best, patience = count, 3
        elif patience > 0:
            patience -= 1
        else:
            last = int(np.flatnonzero(wrong)[-1])
            wrong = np.arange(size) == last
        passive = passive ^ wrong
    return np.maximum(u, 0.0)
