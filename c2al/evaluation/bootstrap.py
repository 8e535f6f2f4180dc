"""Poisson bootstrap over users: kernels of `c2al evaluate`.

Letters: N rows of a block, A axes, G segments (of all axes together), J runs, K logit bins,
R replicates, V sums of a segment, U (user, segment) pairs.

A replicate r gives every row of user u the weight w(u, r) ~ Poisson(1), a pure function of (seed,
u, r). So both runs, all seeds and all segments share the weights, rows may come in any order and
any blocks, and memory does not depend on the number of rows or users (the streaming bootstrap of
Chamandy et al., "Estimating Uncertainty for Massive Data Streams", 2012). Column 0 of every result
has weight 1: the point estimate.
"""

import math

import numpy as np
from numpy.typing import NDArray

from c2al.compiled import compiled
from c2al.data.hashing import mix64
from c2al.ne import normalized_entropy

Float = NDArray[np.float64]

NEGATIVES, POSITIVES, RUNS = 0, 1, 2
"""V = 2 + 4 J: weight of negatives, of positives, then for each run these four sums."""
LOSS, PREDICTION, ABOVE, BELOW = 0, 1, 2, 3
"""Of weight * log loss, weight * prediction; over positives, of the share of negatives ranked
below; over negatives, of the share of positives ranked above."""

_STEP = np.uint64(0x9E3779B97F4A7C15)
_POISSON = np.array(
    [min(int(sum(math.exp(-1) / math.factorial(i) for i in range(k + 1)) * 2.0**64), 2**64 - 1) for k in range(20)],
    dtype=np.uint64,
)
"""w = number of these thresholds (the Poisson(1) distribution function in 64 bits) that a hash reaches."""


_mix = compiled(inline="always")(mix64)


@compiled()
def poisson_weights(seed, user, weight_R):  # type: ignore[no-untyped-def]
    """Fills weight_R with 1 and then w(user, 1), w(user, 2), ... for two uint64 values."""
    state = _mix(_mix(seed + _STEP) ^ user)
    weight_R[0] = 1.0
    for r in range(1, len(weight_R)):
        h = _mix(state + np.uint64(r) * _STEP)
        k = 0
        while k < len(_POISSON) and h >= _POISSON[k]:
            k += 1
        weight_R[r] = k


@compiled()
def count(segment_NA, label_N, weight_N, bin_NJ, rows_G2, histogram_GJ2K):  # type: ignore[no-untyped-def]
    """Adds a block to the rows of each segment and label, and to its weighted logit histograms.

    segment_NA: index of the row's segment on each axis, -1 for none.
    """
    for n in range(len(label_N)):
        y = label_N[n]
        for a in range(segment_NA.shape[1]):
            g = segment_NA[n, a]
            if g >= 0:
                rows_G2[g, y] += 1
                for j in range(bin_NJ.shape[1]):
                    histogram_GJ2K[g, j, y, bin_NJ[n, j]] += weight_N[n]


def placements(histogram_GJ2K: Float) -> tuple[Float, Float, Float]:
    """(place_GJ2K, auc_GJ, error_GJ) of weighted histograms of negatives [..., 0, :] and positives.

    place[..., 1, k]: share of negatives ranked below a positive of bin k; place[..., 0, k]: share of
    positives ranked above a negative of bin k; one bin counts half. `error` bounds the distance of
    `auc` to the AUC without bins. All NaN where a class is absent.
    """
    total_GJ2 = histogram_GJ2K.sum(axis=-1)
    total_GJ2 = np.where(total_GJ2 > 0, total_GJ2, np.nan)
    negative, positive = (histogram_GJ2K[..., y, :] / total_GJ2[..., y, None] for y in (0, 1))
    below = negative.cumsum(axis=-1) - negative / 2
    above = 1 - positive.cumsum(axis=-1) + positive / 2
    error = (negative * positive).sum(axis=-1) / 2
    return np.stack((above, below), axis=-2), (positive * below).sum(axis=-1), error


@compiled()
def resample(user_N, segment_NA, label_N, weight_N, loss_NJ, prediction_NJ, bin_NJ, place_GJ2K, seed, sums_GVR):  # type: ignore[no-untyped-def]
    """Adds a block, sorted by user, to the sums of every segment and replicate.

    Rows of a user and a segment are summed first, so the R-long inner loop runs once for each
    (user, segment) of a block instead of for each row. Cost: about R * V / 4 ns each.
    """
    groups, sums, replicates = sums_GVR.shape
    own_GV = np.zeros((groups, sums))
    seen_G = np.zeros(groups, dtype=np.bool_)
    touched = np.empty(groups, dtype=np.int64)
    weight_R = np.empty(replicates)
    first = 0
    while first < len(user_N):
        last = first
        count_touched = 0
        while last < len(user_N) and user_N[last] == user_N[first]:
            y, w = label_N[last], weight_N[last]
            for a in range(segment_NA.shape[1]):
                g = segment_NA[last, a]
                if g < 0:
                    continue
                if not seen_G[g]:
                    seen_G[g] = True
                    touched[count_touched] = g
                    count_touched += 1
                own_GV[g, y] += w
                for j in range(loss_NJ.shape[1]):
                    v = RUNS + 4 * j
                    own_GV[g, v + LOSS] += w * loss_NJ[last, j]
                    own_GV[g, v + PREDICTION] += w * prediction_NJ[last, j]
                    own_GV[g, v + (ABOVE if y == 1 else BELOW)] += w * place_GJ2K[g, j, y, bin_NJ[last, j]]
            last += 1
        poisson_weights(seed, user_N[first], weight_R)
        for i in range(count_touched):
            g = touched[i]
            seen_G[g] = False
            for v in range(sums):
                x = own_GV[g, v]
                own_GV[g, v] = 0.0
                if x != 0.0:
                    for r in range(replicates):
                        sums_GVR[g, v, r] += x * weight_R[r]
        first = last


@compiled()
def resample_pairs(user_N, item_N, segment_NA, label_N, weight_N, loss_NJ, seed, sums_GVR):  # type: ignore[no-untyped-def]
    """Adds a block to the sums of a bootstrap that gives a row the weight w(user, r) w(item, r).

    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007). V = 2 + J: weight of negatives,
    of positives, weighted loss of each run. Cost: about R * V ns per row and axis.
    """
    replicates = sums_GVR.shape[2]
    user_R, item_R = np.empty(replicates), np.empty(replicates)
    # Users and items draw from streams of their own: a user and an item of one id have nothing in common.
    item_seed = _mix(seed ^ np.uint64(0xA0761D6478BD642F))
    for n in range(len(user_N)):
        if n == 0 or user_N[n] != user_N[n - 1]:
            poisson_weights(seed, user_N[n], user_R)
        poisson_weights(item_seed, item_N[n], item_R)
        for a in range(segment_NA.shape[1]):
            g = segment_NA[n, a]
            if g < 0:
                continue
            for r in range(replicates):
                w = weight_N[n] * user_R[r] * item_R[r]
                if w != 0.0:
                    sums_GVR[g, label_N[n], r] += w
                    for j in range(loss_NJ.shape[1]):
                        sums_GVR[g, 2 + j, r] += w * loss_NJ[n, j]


@compiled()
def resample_sums(user_U, segment_U, sum_UV, seed, sums_GVR):  # type: ignore[no-untyped-def]
    """Adds sums that belong to one user and one segment each, sorted by user, to the replicates."""
    weight_R = np.empty(sums_GVR.shape[2])
    for u in range(len(user_U)):
        if u == 0 or user_U[u] != user_U[u - 1]:
            poisson_weights(seed, user_U[u], weight_R)
        for v in range(sum_UV.shape[1]):
            for r in range(len(weight_R)):
                sums_GVR[segment_U[u], v, r] += sum_UV[u, v] * weight_R[r]


def metrics(sums_VR: Float, auc_J: Float) -> dict[str, Float]:
    """ne, calibration and auc of one segment, each (J, R), NaN where undefined.

    auc of a replicate: the Hajek projection of the resampled AUC, the resampled mean placement of
    positives plus that of negatives minus the AUC itself, which needs sums only; column 0 is the AUC.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        negatives_R, positives_R = (np.where(sums_VR[y] > 0, sums_VR[y], np.nan) for y in (NEGATIVES, POSITIVES))
        run_JSR = sums_VR[RUNS:].reshape(len(auc_J), 4, -1)
        return {
            "ne": normalized_entropy(run_JSR[:, LOSS], sums_VR[POSITIVES], sums_VR[NEGATIVES]),
            "calibration": run_JSR[:, PREDICTION] / positives_R,
            "auc": run_JSR[:, ABOVE] / positives_R + run_JSR[:, BELOW] / negatives_R - auc_J[:, None],
        }
