"""Exact percentile cuts by radix select, in two passes over the data.

The bits of a float32, with the sign folded in, order like the number. Pass one counts the top 16
bits; the bucket that holds the wanted rank is then known, and pass two counts the low 16 bits
inside it. The counts are sums, so the cut does not depend on how rows are split over ranks, threads
or files, and its rank error is 0.
"""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from c2al.compiled import compiled
from c2al.errors import CohortError

RADIX = 1 << 16


class PercentileCuts:
    """The interior cuts of one percentile axis.

    Pass one: `count` every value with `stage` 0, sum the histograms over threads and ranks, `narrow`.
    Pass two: the same with `stage` 1, then `finish`.
    """

    def __init__(self, axis: str, percentiles: tuple[float, ...]):
        """`percentiles` ascend from 0 to 100; only those between the two need a cut."""
        self.axis = axis
        self._percentiles = percentiles[1:-1]
        self._bucket_of: npt.NDArray[np.int32] | None = None
        self._row = np.empty(0, np.int64)
        """Index among the values inside its bucket of each cut, after `narrow`."""
        self._bucket = np.empty(0, np.int64)
        self._below = np.empty(0, np.int64)
        self.values = 0
        """Values that are neither null nor NaN, after `narrow`."""

    def histogram(self) -> npt.NDArray[np.int64]:
        """Zeros of the present pass's shape: (buckets, 65536)."""
        return np.zeros((1 if self._bucket_of is None else len(np.unique(self._bucket)), RADIX), np.int64)

    def count(self, value_R: npt.NDArray[np.float32], histogram: npt.NDArray[np.int64]) -> None:
        """Adds the values of a block (NaN: missing) to a histogram of the present pass."""
        bits_R = (value_R + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
        if self._bucket_of is None:
            _count_top(value_R, bits_R, histogram[0])
        else:
            _count_low(value_R, bits_R, self._bucket_of, histogram)

    def narrow(self, total: npt.NDArray[np.int64]) -> None:
        """Ends pass one. Raises CohortError naming the axis if it has no value at all."""
        cumulative = np.cumsum(total[0])
        self.values = int(cumulative[-1])
        if not self.values:
            raise CohortError(f"axis '{self.axis}': every value is null, there is nothing to cut at percentiles")
        rank = np.array([int(Fraction(repr(p)) * self.values // 100) for p in self._percentiles], np.int64)
        self._bucket = np.searchsorted(cumulative, rank, side="right")
        self._below = (cumulative - total[0])[self._bucket]
        self._row = rank - self._below
        self._bucket_of = np.full(RADIX, -1, np.int32)
        for i, bucket in enumerate(np.unique(self._bucket)):
            self._bucket_of[bucket] = i

    def finish(self, total: npt.NDArray[np.int64], tolerance: float) -> tuple[float, ...]:
        """Ends pass two: the cuts; cohort i holds [cut i-1, cut i).

        Raises CohortError naming axis, cut and share where ties leave a cohort with a share of the
        values that is more than `tolerance` away from the one asked for, or with none, and where a cut
        is infinite.
        """
        assert self._bucket_of is not None
        cumulative = np.cumsum(total, axis=1)
        cuts, below = [], [0]
        for bucket, row, before in zip(self._bucket, self._row, self._below, strict=True):
            of_bucket = cumulative[self._bucket_of[bucket]]
            low = int(np.searchsorted(of_bucket, row, side="right"))
            cuts.append(_value(int(bucket) << 16 | low))
            below.append(int(before + (of_bucket[low - 1] if low else 0)))
        below.append(self.values)
        self._check(cuts, np.diff(below) / self.values, tolerance)
        return tuple(float(str(c)) for c in cuts)

    def _check(self, cuts: list[np.float32], held: npt.NDArray[np.float64], tolerance: float) -> None:
        """Raises CohortError for cuts that do not divide the values as asked. `held`: the share of each cohort."""
        bounds = (0.0, *self._percentiles, 100.0)
        for percentile, cut in zip(self._percentiles, cuts, strict=True):
            if not np.isfinite(cut):
                raise CohortError(
                    f"axis '{self.axis}': the cut at p{percentile:g} is {cut}, since so many values are infinite or "
                    "beyond float32; write null for what is not known, or choose kind = 'edges'"
                )
        for i, share in enumerate(held):
            asked = (bounds[i + 1] - bounds[i]) / 100
            if share == 0 or abs(share - asked) > tolerance:
                shown = ", ".join(f"p{p:g} at {float(str(c)):.9g}" for p, c in zip(bounds[1:-1], cuts, strict=True))
                raise CohortError(
                    f"axis '{self.axis}': ties leave cohort p{bounds[i]:g}-p{bounds[i + 1]:g} with {share:.1%} of the "
                    f"values instead of {asked:.1%} (discover.cut_tolerance = {tolerance:g}); the cuts would be "
                    f"{shown}; choose other percentiles, or kind = 'edges' with edges of your own"
                )


def _value(key: int) -> np.float32:
    """The float32 whose ordered bits are `key`."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return np.uint32(bits).view(np.float32)


@compiled()
def _ordered(bits):  # type: ignore[no-untyped-def]
    flip = np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000)
    return bits ^ flip


@compiled()
def _count_top(value_R, bits_R, count):  # type: ignore[no-untyped-def]
    for i in range(len(value_R)):
        if value_R[i] == value_R[i]:
            count[np.uint64(_ordered(bits_R[i]) >> np.uint32(16))] += 1


@compiled()
def _count_low(value_R, bits_R, bucket_of, count):  # type: ignore[no-untyped-def]
    for i in range(len(value_R)):
        key = _ordered(bits_R[i])
        bucket = bucket_of[np.uint64(key >> np.uint32(16))]
        if bucket >= 0 and value_R[i] == value_R[i]:
            count[bucket, np.uint64(key & np.uint32(0xFFFF))] += 1
