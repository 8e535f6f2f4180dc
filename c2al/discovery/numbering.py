"""Digits of one to three axes -> the number of each row's cohort.

Legend: R rows of a block, P axes of a target, C cohorts. A digit stands for a value of one axis, a
number for a cohort: a value, or a combination of values, that occurs. Numbers are given by value, in
the order in which cohorts appear, and never change.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from c2al.compiled import compiled
from c2al.discovery.digits import Digits, Encoder
from c2al.discovery.histogram import Key
from c2al.errors import CohortError

_COMBINATIONS = 1 << 24
"""Entries of the table of combinations: 64 MiB."""
_PIECE = 2048
"""Rows of a block that the kernel takes at a time: they stay in the first-level cache."""


class Numbering:
    """Numbers the cohorts of a target, the combinations of its one to three axes' values that occur.

    Raises CohortError for more cohorts than the cap, or when the axes' digits have 2^24 combinations
    or more.
    """

    def __init__(self, parts: Sequence[Encoder], axis: str, cap: int):
        self._parts, self._axis, self._cap = parts, axis, cap
        self.keys: list[Key] = []
        """The cohort of each number given out so far."""
        self._number: dict[Key, int] = {}
        self._layout: tuple[int, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._scales: tuple[int, ...] = ()
        """What each of three digits counts in the table's index; 0 for one this target does not have."""
        self._table = np.empty(0, np.int32)
        """Number of each combination of digits, in row-major order of `_sizes`; -1: not met in this layout."""
        self._buffer = np.empty(0, np.int32)

    def __call__(self, digits: Sequence[Digits]) -> npt.NDArray[np.int32]:
        """Numbers of a block's rows: int32 (R,), indices into `keys`, valid until the next call."""
        layout = tuple(p.layout for p in self._parts)
        if layout != self._layout:
            self._lay_out(layout)
        if len(self._buffer) < len(digits[0]):
            self._buffer = np.empty(len(digits[0]), np.int32)
        number_R = self._buffer[: len(digits[0])]
        for digit_R in digits:
            digit_R.flags.writeable = False  # as pyarrow's arrays are: one signature to compile
        first_R, second_R, third_R = (*digits, digits[0], digits[0])[:3]
        if not _number(first_R, second_R, third_R, *self._scales, self._table, number_R):
            new_R = number_R < 0
            self._add(np.unique(np.ravel_multi_index(tuple(d[new_R] for d in digits), self._sizes)))
            _number(first_R, second_R, third_R, *self._scales, self._table, number_R)
        return number_R

    def _lay_out(self, layout: tuple[int, ...]) -> None:
        sizes = tuple(p.size for p in self._parts)
        if math.prod(sizes) >= _COMBINATIONS:
            raise CohortError(
                f"axis '{self._axis}' crosses {' x '.join(map(str, sizes))} values, "
                f"more combinations than discovery can number"
            )
        self._layout, self._sizes, self._table = layout, sizes, np.full(math.prod(sizes), -1, np.int32)
        self._scales = tuple(math.prod(sizes[i + 1 :]) * (i < len(sizes)) for i in range(3))
        if self.keys:
            digits_PC = np.array([p.digits(c) for p, c in zip(self._parts, zip(*self.keys, strict=True), strict=True)])
            known_C = (digits_PC >= 0).all(axis=0)
            self._table[np.ravel_multi_index(tuple(digits_PC[:, known_C]), sizes)] = np.flatnonzero(known_C)

    def _add(self, combinations: npt.NDArray[np.int64]) -> None:
        """Numbers combinations of the present layout."""
        columns = np.unravel_index(combinations, self._sizes)
        categories = [[p.category(d) for d in c.tolist()] for p, c in zip(self._parts, columns, strict=True)]
        for combination, key in zip(combinations.tolist(), zip(*categories, strict=True), strict=True):
            number = self._number.setdefault(key, len(self._number))
            if number == len(self.keys):
                if number >= self._cap:
                    own = zip(self._parts, (len(set(c)) for c in categories), strict=True)
                    axis = next((part.axis for part, values in own if values > self._cap), self._axis)
                    raise CohortError(f"axis '{axis}' has more than {self._cap} cohorts (discover.max_cohorts)")
                self.keys.append(key)
            self._table[combination] = number


@compiled()
def _number(first_R, second_R, third_R, scale_1, scale_2, scale_3, table, number_R):  # type: ignore[no-untyped-def]
    """Writes the table's entries of the combinations; whether none is -1. A scale of 0 leaves a digit out.

    In short pieces: the combinations are SIMD code, and still in the first-level cache when looked up.
    """
    seen = np.int32(0)
    scale_1, scale_2, scale_3 = np.uint32(scale_1), np.uint32(scale_2), np.uint32(scale_3)
    at = np.empty(_PIECE, np.uint32)
    for start in range(np.uint64(0), np.uint64(len(number_R)), np.uint64(_PIECE)):
        end = start + np.uint64(_PIECE)
        first, second, third, number = first_R[start:end], second_R[start:end], third_R[start:end], number_R[start:end]
        for i in range(len(number)):
            at[i] = np.uint32(first[i]) * scale_1 + np.uint32(second[i]) * scale_2 + np.uint32(third[i]) * scale_3
        for i in range(len(number)):
            number[i] = table[np.uint64(at[i])]
            seen |= number[i]
    return seen >= 0
