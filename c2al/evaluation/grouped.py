"""GAUC: the AUC within a user, averaged over users by their impressions.

Letters: N rows, A axes, J runs, U (user, segment) pairs.

A user's rows lie anywhere in the files, so all rows of a share of the users, chosen by the users' hash, are
held at a time and the files are read once per share.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Float = NDArray[np.float64]


@njit(nogil=True)
def user_aucs(user_N, segment_NA, label_N, weight_N, prediction_NJ, groups):  # type: ignore[no-untyped-def]
    """(user_U, segment_U, sum_UV) of rows sorted by user; V = 1 + J.

    sum_UV: the weight of the user's rows in the segment, then weight * AUC of each run, ties counted half.
    Users without positives or without negatives in a segment have no AUC there and are left out.
    """
    rows, axes, runs = len(user_N), segment_NA.shape[1], prediction_NJ.shape[1]
    pairs = _pairs(user_N, segment_NA, groups)
    user_U, segment_U = np.empty(pairs, np.uint64), np.empty(pairs, np.int64)
    sum_UV = np.empty((pairs, 1 + runs))
    used = 0
    first = 0
    while first < rows:
        last = first
        while last < rows and user_N[last] == user_N[first]:
            last += 1
        order_J = [np.argsort(prediction_NJ[first:last, j]) + first for j in range(runs)]
        for a in range(axes):
            for g in np.unique(segment_NA[first:last, a]):
                if g < 0:
                    continue
                negatives = positives = 0.0
                for n in range(first, last):
                    if segment_NA[n, a] == g:
                        if label_N[n] == 1:
                            positives += weight_N[n]
                        else:
                            negatives += weight_N[n]
                if negatives <= 0.0 or positives <= 0.0:
                    continue
                user_U[used], segment_U[used] = user_N[first], g
                sum_UV[used, 0] = negatives + positives
                for j in range(runs):
                    wins = _wins(order_J[j], segment_NA[:, a], g, label_N, weight_N, prediction_NJ[:, j])
                    sum_UV[used, 1 + j] = (negatives + positives) * wins / (negatives * positives)
                used += 1
        first = last
    return user_U[:used], segment_U[:used], sum_UV[:used]


@njit(nogil=True)
def _pairs(user_N, segment_NA, groups):  # type: ignore[no-untyped-def]
    """Number of (user, segment) pairs, an upper bound for users with an AUC."""
    seen_G = np.full(groups, -1, np.int64)
    pairs = number = 0
    for n in range(len(user_N)):
        if n == 0 or user_N[n] != user_N[n - 1]:
            number += 1
        for a in range(segment_NA.shape[1]):
            g = segment_NA[n, a]
            if g >= 0 and seen_G[g] != number:
                seen_G[g] = number
                pairs += 1
    return pairs


@njit(nogil=True)
def _wins(order, segment_N, g, label_N, weight_N, prediction_N):  # type: ignore[no-untyped-def]
    """Sum over (positive, negative) pairs of weights * [positive ranked above], ties half."""
    below = wins = 0.0
    i = 0
    while i < len(order):
        k = i
        tied_negative = tied_positive = 0.0
        while k < len(order) and prediction_N[order[k]] == prediction_N[order[i]]:
            n = order[k]
            if segment_N[n] == g:
                if label_N[n] == 1:
                    tied_positive += weight_N[n]
                else:
                    tied_negative += weight_N[n]
            k += 1
        wins += tied_positive * (below + tied_negative / 2)
        below += tied_negative
        i = k
    return wins


def grouped_auc(sums_VR: Float) -> Float:
    """(J, R) GAUC of one segment, NaN where no user has both classes."""
    weight_R = np.where(sums_VR[0] > 0, sums_VR[0], np.nan)
    gauc_JR: Float = sums_VR[1:] / weight_R
    return gauc_JR
