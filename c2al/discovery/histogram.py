"""Histograms of predictions per cohort, whose bins are the bits of the float.

Legend: R rows of a block, C cohorts, S fine slots, K coarse slots, G jackknife groups.

A prediction in [2^-24, 1) falls in the bin of its exponent and its first 6 mantissa bits: 64 bins an
octave, 1,536 in all, the same on every machine. Linear bins of p would lose the low rates that
CTR and CVR have. Slot 0 holds [0, 2^-24) and counts as 0, the last slot holds exactly 1. The 17
mantissa bits below the bin are summed as integers, so a cohort's mean prediction is exact and
merging in any order gives the same bits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from c2al.compiled import compiled
from c2al.data.cohort_codes import Category
from c2al.errors import CohortError

BINS = 24 * 64
SLOTS = BINS + 2
"""S: 0, the bins, 1."""
COARSE = BINS // 4 + 2
"""K: 0, 16 bins per octave, 1."""
GROUPS = 32
"""G, of the delete-a-group jackknife; a row's group is a hash of its user."""
NEGATIVE, POSITIVE = 0, 1
COUNT, LOW = 0, 1
"""Last index of `Counts.fine`: rows, and the sum of their low 17 mantissa bits."""

_LOW_BITS = 17
LOW_MASK = (1 << _LOW_BITS) - 1
_FIRST = (127 - 24) << (23 - _LOW_BITS)
"""bits >> 17 of 2^-24."""
_MOST_ROWS = 1 << 23
_PACK = 23 + _LOW_BITS
"""Low bits of a packed cell: 2^23 rows' low mantissa bits sum to less than 2^40; the count is above them."""
_ONE = np.uint32(0x3F800000)
_MINUS_ZERO = np.uint32(0x80000000)

Key = tuple[Category | None, ...]
"""Of a cohort: for each plain axis its category, or the index of its interval, or None for null."""


def slot_edges() -> npt.NDArray[np.float64]:
    """Lower edges of the S slots: float64 (S,). A slot ends where the next begins; the last is the point 1."""
    bits = (np.arange(BINS + 1, dtype=np.uint32) + np.uint32(_FIRST)) << np.uint32(_LOW_BITS)
    return np.concatenate([[0.0], bits.view(np.float32).astype(np.float64)])


def coarse_edges() -> npt.NDArray[np.float64]:
    """Lower edges of the K coarse slots: float64 (K,)."""
    return slot_edges()[np.r_[0, 1:SLOTS:4]]


def to_coarse(count_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums the last axis from S fine to K coarse slots."""
    body = count_S[..., 1:-1].reshape(*count_S.shape[:-1], BINS // 4, 4).sum(-1)
    return np.concatenate([count_S[..., :1], body, count_S[..., -1:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one scan target saw, cohort by cohort; all integers, so sums do not depend on order."""

    keys: tuple[Key, ...]
    """Of the C cohorts, in `key_order`."""
    fine_CS22: npt.NDArray[np.int64]
    """[cohort, slot, negative/positive, count/low bits]."""
    group_CGK: npt.NDArray[np.int64]
    """[cohort, user group, coarse slot]: rows. G = 0 where the scan ran without a jackknife."""

    def __add__(self, other: "Counts") -> "Counts":
        """Aligned by key. Raises CohortError for keys of different types."""
        if not self.keys or not other.keys:
            return self if self.keys else other
        try:
            keys = tuple(sorted({*self.keys, *other.keys}, key=key_order))
        except TypeError as e:
            raise CohortError(f"a column holds numbers in one part of the data and text in another: {e}") from e
        left, right = self.spread(keys), other.spread(keys)
        return Counts(keys, left.fine_CS22 + right.fine_CS22, left.group_CGK + right.group_CGK)

    def spread(self, keys: Sequence[Key]) -> "Counts":
        """The same counts laid out for `keys`, which contain all of our own."""
        if tuple(keys) == self.keys:
            return self
        index = {key: i for i, key in enumerate(keys)}
        return self._gather(tuple(keys), [index[k] for k in self.keys])

    def marginal(self, parts: Sequence[int]) -> "Counts":
        """Counts over the key components `parts` (in their order), summed over the others."""
        own = [tuple(key[p] for p in parts) for key in self.keys]
        keys = tuple(sorted(set(own), key=key_order))
        index = {key: i for i, key in enumerate(keys)}
        return self._gather(keys, [index[k] for k in own])

    def _gather(self, keys: tuple[Key, ...], target: list[int]) -> "Counts":
        fine = np.zeros((len(keys), *self.fine_CS22.shape[1:]), np.int64)
        group = np.zeros((len(keys), *self.group_CGK.shape[1:]), np.int64)
        np.add.at(fine, target, self.fine_CS22)
        np.add.at(group, target, self.group_CGK)
        return Counts(keys, fine, group)


def key_order(key: Key) -> tuple[tuple[bool, Category], ...]:
    """Sort key of cohorts: ascending by value, null last."""
    return tuple((part is None, 0 if part is None else part) for part in key)


class BlockCounter:
    """One thread's growing counts of one target; cohorts are numbered as they appear.

    A block goes into compact cells that fit the cache (one uint64 for count and low bits, uint32 for
    the groups), which are emptied into int64 before they can overflow.
    """

    def __init__(self, jackknife: bool):
        groups = GROUPS if jackknife else 0
        self._packed = np.zeros((0, SLOTS, 2), np.uint64)
        self._group32 = np.zeros((0, groups, COARSE), np.uint32)
        self._fine = np.zeros((0, SLOTS, 2, 2), np.int64)
        self._group = np.zeros((0, groups, COARSE), np.int64)
        self._rows = 0

    def add(self, rows: "PreparedRows", code_R: npt.NDArray[np.int32], cohorts: int) -> None:
        """Counts a block whose cohort numbers `code_R` lie in [0, cohorts). At most 2^23 rows."""
        if self._rows + len(code_R) > _MOST_ROWS:
            self._spill()
        if cohorts > len(self._packed):
            self._packed, self._group32, self._fine, self._group = (
                _grow(a, max(cohorts, len(a) * 5 // 4)) for a in (self._packed, self._group32, self._fine, self._group)
            )
        self._rows += len(code_R)
        _scatter(code_R, rows.place, self._packed.reshape(-1))
        if self._group32.size:
            _scatter_groups(code_R, rows.group_cell, self._group32.reshape(-1))

    def take(self, keys: Sequence[Key]) -> Counts:
        """The counts of the cohorts that have rows, by `keys` of the numbers, and starts again at zero."""
        self._spill()
        seen = np.flatnonzero(self._fine[: len(keys), :, :, COUNT].any(axis=(1, 2)))
        order = sorted(seen.tolist(), key=lambda c: key_order(keys[c]))
        counts = Counts(tuple(keys[c] for c in order), self._fine[order], self._group[order])
        self._fine[:], self._group[:] = 0, 0
        return counts

    def _spill(self) -> None:
        self._fine[..., COUNT] += (self._packed >> np.uint64(_PACK)).view(np.int64)
        self._fine[..., LOW] += (self._packed & np.uint64((1 << _PACK) - 1)).view(np.int64)
        self._group += self._group32
        self._packed[:], self._group32[:], self._rows = 0, 0, 0


class PreparedRows:
    """Where each row of a block lands within its cohort; shared by all targets. Buffers are reused."""

    def __init__(self, most_rows: int):
        self._place, self._group_cell = np.empty(most_rows, np.uint32), np.empty(most_rows, np.uint16)
        self.place, self.group_cell = self._place, self._group_cell
        """Of each row: 2 slot + label and below it the 17 low bits; group x K + coarse slot."""

    def fill(
        self,
        prediction_R: npt.NDArray[np.float32],
        label_R: npt.NDArray[np.float32],
        group_R: npt.NDArray[np.uint8] | None,
    ) -> int:
        """Returns the number of rows before the first one whose prediction or label is not valid.

        A prediction must lie in [0, 1] (-0.0 is 0), a label must be 0 or 1. `group_R` < G is the
        row's jackknife group, None without a jackknife.
        """
        rows = len(prediction_R)
        self.place, self.group_cell = self._place[:rows], self._group_cell[:rows]
        valid = bool(_prepare(prediction_R.view(np.uint32), label_R, self.place))
        if not valid:
            return int(np.argmin((prediction_R >= 0) & (prediction_R <= 1) & ((label_R == 0) | (label_R == 1))))
        if group_R is not None:
            _prepare_groups(self.place, group_R, self.group_cell)
        return rows


def _grow(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


# The kernels index with unsigned integers: numba then leaves out the wrap-around of negative ones.


@compiled()
def _prepare(bits_R, label_R, place_R):  # type: ignore[no-untyped-def]
    """Branch-free, so that it becomes SIMD code; whether every row is valid is folded into one flag."""
    bad = False
    for i in range(len(bits_R)):
        bits = bits_R[i]
        label = label_R[i]
        bad |= (bits > _ONE) & (bits != _MINUS_ZERO)
        bad |= (label != np.float32(0)) & (label != np.float32(1))
        slot = np.int32(bits >> np.uint32(_LOW_BITS)) - np.int32(_FIRST - 1)
        inside = (slot > np.int32(0)) & (slot <= np.int32(BINS))
        slot = min(max(slot, np.int32(0)), np.int32(SLOTS - 1))
        slot = np.int32(0) if bits == _MINUS_ZERO else slot
        cell = np.uint32(2) * np.uint32(slot) + np.uint32(label == np.float32(1))
        low = bits & np.uint32(LOW_MASK) if inside else np.uint32(0)
        place_R[i] = cell << np.uint32(_LOW_BITS) | low
    return not bad


@compiled()
def _prepare_groups(place_R, group_R, group_cell_R):  # type: ignore[no-untyped-def]
    for i in range(len(place_R)):
        coarse = ((place_R[i] >> np.uint32(_LOW_BITS + 1)) + np.uint32(3)) >> np.uint32(2)
        group_cell_R[i] = np.uint32(group_R[i]) * np.uint32(COARSE) + coarse


@compiled()
def _scatter(code_R, place_R, packed):  # type: ignore[no-untyped-def]
    one = np.uint64(1) << np.uint64(_PACK)
    for i in range(len(code_R)):
        place = place_R[i]
        at = np.uint32(code_R[i]) * np.uint32(SLOTS * 2) + (place >> np.uint32(_LOW_BITS))
        packed[np.uint64(at)] += one + np.uint64(place & np.uint32(LOW_MASK))


@compiled()
def _scatter_groups(code_R, group_cell_R, group):  # type: ignore[no-untyped-def]
    for i in range(len(code_R)):
        at = np.uint32(code_R[i]) * np.uint32(GROUPS * COARSE) + np.uint32(group_cell_R[i])
        group[np.uint64(at)] += np.uint32(1)
