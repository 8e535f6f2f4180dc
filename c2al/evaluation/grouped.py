"""GAUC: the AUC within a user, averaged over users by their impressions.

Letters: N rows, A axes, J runs, U (user, segment) pairs.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from c2al.compiled import compiled
from c2al.files import output_errors

Float = NDArray[np.float64]
UserSums = tuple[NDArray[np.uint64], NDArray[np.int64], Float]
UserRows = tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.uint8], Float, Float]
"""(user_N, segment_NA, label_N, weight_N, prediction_NJ) of some rows."""


def bytes_per_row(axes: int, runs: int) -> int:
    """Most that `shares` and `user_aucs` hold for a row of a share: the row, and three times what one axis sorts."""
    return 17 + 4 * axes + 8 * runs + 3 * (25 + 8 * runs)


def shares(parts: Iterable[UserRows], axes: int, runs: int, count: int) -> Iterator[UserRows]:
    """All rows of a `count`-th of the users, then those of the next, each in the order of `parts`.

    A user's rows lie anywhere in the files. With more than one share the rows go into a temporary file per share, so
    the scores are read once: 17 + 4 A + 8 J bytes per row, in the folder TMPDIR, or the system's own without it.

    Raises OutputError where that folder is full or there is none.
    """
    if count == 1:
        yield _joined(list(parts))
        return
    names = ("user", "segment", "label", "weight", "prediction")
    shapes = (("u8", ()), ("i4", (axes,)), ("u1", ()), ("f8", ()), ("f8", (runs,)))
    row = np.dtype([(name, *shape) for name, shape in zip(names, shapes, strict=True)])
    with _temporary_folder() as folder:
        paths = [Path(folder) / f"users-{share}" for share in range(count)]
        for columns in parts:
            record_N = np.empty(len(columns[0]), row)
            for name, column in zip(names, columns, strict=True):
                record_N[name] = column
            share_N = (columns[0] % np.uint64(count)).astype(np.int64)
            record_N = record_N[np.argsort(share_N, kind="stable")]
            ends = np.cumsum(np.bincount(share_N, minlength=count))
            for path, of_share in zip(paths, np.split(record_N, ends[:-1]), strict=True):
                with output_errors(path), path.open("ab") as file:
                    file.write(of_share.tobytes())
        for path in paths:
            record_N = np.fromfile(path, row)
            path.unlink()
            yield tuple(np.ascontiguousarray(record_N[name]) for name in names)  # type: ignore[misc]


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that goes at the end. Where TMPDIR names none, Python would take another disk without a word."""
    wanted = os.environ.get("TMPDIR") or None
    with contextlib.ExitStack() as stack:
        with output_errors(f"TMPDIR = {wanted or tempfile.gettempdir()}"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="c2al-evaluate-", dir=wanted))
        yield folder


def _joined(kept: list[UserRows]) -> UserRows:
    return tuple(map(np.concatenate, zip(*kept, strict=True)))  # type: ignore[return-value]


def user_aucs(
    user_N: NDArray[np.uint64],
    segment_NA: NDArray[np.int32],
    label_N: NDArray[np.uint8],
    weight_N: Float,
    prediction_NJ: Float,
) -> UserSums:
    """(user_U, segment_U, sum_UV) of all rows of some users, in any order; V = 1 + J. Sorted by user.

    sum_UV: the weight of the user's rows in the segment, then weight * AUC of each run, ties counted half.
    Users without positives or without negatives in a segment have no AUC there and are left out.
    """
    found = [
        _of_axis(*(x[segment_N >= 0] for x in (user_N, segment_N, label_N, weight_N, prediction_NJ)))
        for segment_N in segment_NA.T
    ]
    user_U, segment_U, sum_UV = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(user_U, kind="stable")
    return user_U[order], segment_U[order], sum_UV[order]


def _of_axis(
    user_N: NDArray[np.uint64],
    segment_N: NDArray[np.int32],
    label_N: NDArray[np.uint8],
    weight_N: Float,
    prediction_NJ: Float,
) -> UserSums:
    order = np.lexsort((segment_N, user_N))
    user_N, segment_N, label_N, weight_N = user_N[order], segment_N[order], label_N[order], weight_N[order]
    first_N = np.ones(len(user_N), np.bool_)
    first_N[1:] = (user_N[1:] != user_N[:-1]) | (segment_N[1:] != segment_N[:-1])
    pair_N, pairs = first_N.cumsum() - 1, int(first_N.sum())
    positives_U = np.bincount(pair_N, weight_N * (label_N == 1), pairs)
    negatives_U = np.bincount(pair_N, weight_N * (label_N == 0), pairs)
    sum_UV = np.empty((pairs, 1 + prediction_NJ.shape[1]))
    sum_UV[:, 0] = positives_U + negatives_U
    used_U = (positives_U > 0) & (negatives_U > 0)
    for j, prediction_N in enumerate(prediction_NJ[order].T):
        ranked = np.lexsort((prediction_N, pair_N))
        wins_U = _wins(pair_N[ranked], label_N[ranked], weight_N[ranked], prediction_N[ranked], pairs)
        auc_U = np.divide(wins_U, positives_U * negatives_U, out=np.zeros(pairs), where=used_U)
        sum_UV[:, 1 + j] = sum_UV[:, 0] * auc_U
    return user_N[first_N][used_U], segment_N[first_N][used_U].astype(np.int64), sum_UV[used_U]


@compiled()
def _wins(pair_N, label_N, weight_N, prediction_N, pairs):  # type: ignore[no-untyped-def]
    """(U,) sum over (positive, negative) pairs of rows of weights * [positive ranked above], ties half.

    Rows are sorted by pair, then prediction.
    """
    wins_U = np.zeros(pairs)
    below = 0.0
    i = 0
    while i < len(pair_N):
        u = pair_N[i]
        if i == 0 or pair_N[i - 1] != u:
            below = 0.0
        negative = positive = 0.0
        k = i
        while k < len(pair_N) and pair_N[k] == u and prediction_N[k] == prediction_N[i]:
            if label_N[k] == 1:
                positive += weight_N[k]
            else:
                negative += weight_N[k]
            k += 1
        wins_U[u] += positive * (below + negative / 2)
        below += negative
        i = k
    return wins_U


def grouped_auc(sums_VR: Float) -> Float:
    """(J, R) GAUC of one segment, NaN where no user has both classes."""
    weight_R = np.where(sums_VR[0] > 0, sums_VR[0], np.nan)
    gauc_JR: Float = sums_VR[1:] / weight_R
    return gauc_JR
