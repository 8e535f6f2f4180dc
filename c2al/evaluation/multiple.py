"""Corrections for how many differences were looked at, with the interval that belongs to each decision.

Letters: M hypotheses.

Every correction gives each hypothesis a level alpha_m such that it passes exactly if its p-value is at most
alpha_m. The interval at confidence 1 - alpha_m then excludes 0 exactly if the hypothesis passes.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Corrected:
    """Per hypothesis, in the order given."""

    p_M: Float
    """Adjusted: at most alpha exactly if the hypothesis passes."""
    level_M: Float
    """alpha_m: the level whose interval agrees with the decision."""
    passes_M: NDArray[np.bool_]


def holm(p_M: Float, alpha: float) -> Corrected:
    """Holm (1979): the chance of any false claim is at most alpha, whatever the dependence.

    Levels follow the steps: alpha / M for the smallest p, alpha / (M - 1) for the next, and the first step
    that fails for all that remain (Serlin 1993). Taken together the intervals of the failing ones do not
    have joint coverage 1 - alpha; the claims "lower" and "higher" keep the family-wise error rate.
    """
    m, order, sorted_M = len(p_M), np.argsort(p_M, kind="stable"), np.sort(p_M)
    step_M = alpha / (m - np.arange(m))
    failed = np.flatnonzero(sorted_M > step_M)
    passing = int(failed[0]) if len(failed) else m
    step_M[passing:] = step_M[passing] if passing < m else alpha
    adjusted_M = np.minimum(np.maximum.accumulate(sorted_M * (m - np.arange(m))), 1.0)
    return _unsorted(order, adjusted_M, step_M, np.arange(m) < passing)


def benjamini_hochberg(p_M: Float, alpha: float, dependent: bool = False) -> Corrected:
    """Benjamini and Hochberg (1995): of what passes, a share of at most alpha is false, on average.

    That holds under independence and positive dependence. dependent: Benjamini and Yekutieli (2001),
    which divides alpha by 1 + 1/2 + .. + 1/M and holds under any dependence. With k of M passing, their
    intervals at level k alpha / M keep the false coverage rate (Benjamini and Yekutieli 2005); those of
    the others have level (k + 1) alpha / M.
    """
    m, order, sorted_M = len(p_M), np.argsort(p_M, kind="stable"), np.sort(p_M)
    share = alpha / float(np.sum(1 / np.arange(1, m + 1))) if dependent and m else alpha
    rank_M = np.arange(1, m + 1)
    below = np.flatnonzero(sorted_M <= share * rank_M / m)
    passing = int(below[-1]) + 1 if len(below) else 0
    level_M = np.where(rank_M <= passing, share * passing / m, share * (passing + 1) / m) if m else sorted_M
    adjusted_M = np.minimum.accumulate((sorted_M * m / rank_M)[::-1])[::-1] * (alpha / share)
    return _unsorted(order, np.minimum(adjusted_M, 1.0), level_M, rank_M <= passing)


def _unsorted(order: NDArray[np.int64], p_M: Float, level_M: Float, passes_M: NDArray[np.bool_]) -> Corrected:
    back = np.argsort(order, kind="stable")
    return Corrected(p_M[back], level_M[back], passes_M[back])
