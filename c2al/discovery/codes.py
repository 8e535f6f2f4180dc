"""Columns of a block -> small integers: cohort numbers of a target, jackknife groups of users.

Legend: R rows of a block. A digit stands for a value of one axis, a number for a cohort: a value or a
combination of values that occurs. Numbers are given by value, as they appear: dictionary codes
differ from row group to row group and mean nothing. Columns become arrays by DLPack, since pyarrow's
`to_numpy` loads pandas (40 MiB).
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from c2al.data.cohorts import Category, numeric
from c2al.discovery.histogram import GROUPS, Key
from c2al.errors import CohortError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_DIRECT = 64
"""Widest range of integer categories that are their own digits."""
_SPAN = 1 << 16
"""Widest range of integer categories whose digits are looked up in a table instead of by sorting."""
_COMBINATIONS = 1 << 24
_PIECE = 2048
"""Rows of a block that a kernel of several passes takes at a time: they stay in the first-level cache."""

_Digits = npt.NDArray[np.int32]
_Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Encoder(Protocol):
    """Digits of one plain axis."""

    axis: str
    size: int
    """Digits lie in [0, size)."""
    layout: int
    """Changes whenever `size` or the meaning of a digit does."""

    def __call__(self, values: "pa.Array") -> _Digits:
        """Digits of the values: int32 (R,)."""

    def category(self, digit: int) -> Category | None:
        """What the digit stands for, as in a `Key`."""

    def digits(self, categories: Iterable[Category | None]) -> list[int]:
        """Digits of the categories, -1 for one that has none."""


class Intervals:
    """Digit i of a numeric column is [cut i-1, cut i), of ascending cuts; the last one is null or NaN."""

    def __init__(self, cuts: Sequence[float], column: str, axis: str):
        self._cuts = np.array(cuts, np.float32)
        self._column, self.axis = column, axis
        self.size, self.layout = len(cuts) + 2, 0

    def __call__(self, values: "pa.Array") -> _Digits:
        value_R = numeric(values, self._column, self.axis)
        digit_R = np.empty(len(value_R), np.int32)
        _cut(value_R, self._cuts, digit_R)
        return digit_R

    def category(self, digit: int) -> Category | None:
        return None if digit == self.size - 1 else digit

    def digits(self, categories: Iterable[Category | None]) -> list[int]:
        return [self.size - 1 if c is None else int(c) for c in categories]


class Categories:
    """Digits of an int, string, dictionary or bool column; the last one is null.

    Raises CohortError for a column of another type.
    """

    def __init__(self, column: str, axis: str):
        self._column, self.axis = column, axis
        self._categories: list[Category] = []
        self._digit: dict[Category, int] = {}
        self._base = 0
        self._table = np.empty(0, np.int32)
        """Digit of integer base + i, or of entry i of `_dictionary`; -1: none yet."""
        self._in_order = True
        """The table holds 0, 1, 2, ..., so nothing need be looked up."""
        self._dictionary: pa.Array | None = None
        self.size, self.layout = 1, 0

    def __call__(self, values: "pa.Array") -> _Digits:
        import pyarrow as pa

        if pa.types.is_dictionary(values.type) and not _is_text(values.type.value_type):
            values = values.dictionary_decode()
        if values.null_count == len(values):
            return np.full(len(values), self.size - 1, np.int32)
        if pa.types.is_boolean(values.type):
            digit_R = self._integers(values.cast(pa.uint8()), bool)
        elif pa.types.is_integer(values.type):
            digit_R = self._integers(values, int)
        elif pa.types.is_dictionary(values.type) or _is_text(values.type):
            digit_R = self._texts(values if pa.types.is_dictionary(values.type) else values.dictionary_encode())
        else:
            raise CohortError(
                f"axis '{self.axis}': column '{self._column}' is {values.type}; a categorical axis needs integers, "
                "strings or bools (a number can be cut by percentiles or edges)"
            )
        if values.null_count:
            null_R = values.is_null().to_numpy(zero_copy_only=False)
            digit_R = np.where(null_R, np.int32(self.size - 1), digit_R)
        return digit_R

    def category(self, digit: int) -> Category | None:
        return None if digit == self.size - 1 else self._categories[digit]

    def digits(self, categories: Iterable[Category | None]) -> list[int]:
        null, of = self.size - 1, self._digit
        return [null if c is None else of.get(c, -1) for c in categories]

    def _integers(self, values: "pa.Array", kind: type[int] | type[bool]) -> _Digits:
        """Digits of the integers; what stands where there is null (not everywhere) means nothing."""
        value_R = _integers(values.fill_null(values.drop_null()[0]) if values.null_count else values, self._column)
        digit_R = np.empty(len(value_R), np.int32)
        if self._look_up(value_R, digit_R):
            return digit_R
        distinct, inverse_R = np.unique(value_R, return_inverse=True)
        low, high = int(distinct[0]), int(distinct[-1])
        if len(self._table):
            low, high = min(low, self._base), max(high, self._base + len(self._table) - 1)
        if high - low < _DIRECT and self._in_order:
            self._base, self._table = low, np.arange(high - low + 1, dtype=np.int32)
            self._set_categories([kind(v) for v in range(low, high + 1)])
        else:
            of_distinct = np.array([self._add(kind(v)) for v in distinct.tolist()], np.int32)
            if high - low >= _SPAN:
                return of_distinct[inverse_R]
            table = np.full(high - low + 1, -1, np.int32)
            table[self._base - low :][: len(self._table)] = self._table
            table[distinct - low] = of_distinct
            self._base, self._table, self._in_order = low, table, False
        self._look_up(value_R, digit_R)
        return digit_R

    def _texts(self, values: "pa.DictionaryArray") -> _Digits:
        if self._dictionary is None or not self._dictionary.equals(values.dictionary):
            self._dictionary, texts = values.dictionary, values.dictionary.to_pylist()
            self._in_order = len(texts) <= _DIRECT
            if self._in_order:
                self._set_categories(texts)
            else:
                self._table = np.array([self._add(text) for text in texts], np.int32)
        index_R = _word(np.from_dlpack(values.indices.fill_null(0) if values.null_count else values.indices))
        if self._in_order:
            return index_R.astype(np.int32, copy=False)
        digit_R = np.empty(len(index_R), np.int32)
        _look_up(index_R, 0, self._table, digit_R)
        return digit_R

    def _look_up(self, value_R: _Integers, digit_R: _Digits) -> bool:
        """Writes the digits of integers; whether all of them have one."""
        if self._in_order:
            return bool(_subtract(value_R, self._base, len(self._table), digit_R))
        return bool(_look_up(value_R, self._base, self._table, digit_R))

    def _add(self, category: Category) -> int:
        digit = self._digit.setdefault(category, len(self._categories))
        if digit == len(self._categories):
            self._categories.append(category)
            self.size, self.layout = len(self._categories) + 1, self.layout + 1
        return digit

    def _set_categories(self, categories: list[Category]) -> None:
        self._categories, self._digit = categories, {c: i for i, c in enumerate(categories)}
        self.size, self.layout = len(categories) + 1, self.layout + 1


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

    def __call__(self, digits: Sequence[_Digits]) -> npt.NDArray[np.int32]:
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


def user_groups(users: "pa.Array", column: str) -> npt.NDArray[np.uint8]:
    """Jackknife group of each row, a hash of its user's integer or string: uint8 (R,), below G.

    Equal users share a group in every file, whatever their encoding. All rows without a user count
    as one user. Raises DataError naming the column if it is neither integer nor string.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(users.type):
        of_entry = user_groups(users.dictionary, column)
        entry_R = np.from_dlpack(users.indices.fill_null(len(of_entry)))
        return np.asarray(np.append(of_entry, np.uint8(0))[entry_R])
    group_R = np.empty(len(users), np.uint8)
    if pa.types.is_integer(users.type):
        _hash_integers(_integers(users.fill_null(0) if users.null_count else users, column), group_R)
    elif _is_text(users.type):
        text = users.cast(pa.large_binary())
        _, offsets, data = text.buffers()
        offset_R = np.frombuffer(offsets, np.int64)[text.offset :][: len(text) + 1]
        _hash_bytes(np.frombuffer(data or b"", np.uint8), offset_R, group_R)
    else:
        raise DataError(f"column '{column}' (the user) is {users.type}, needs integers or strings")
    if users.null_count:
        group_R[users.is_null().to_numpy(zero_copy_only=False)] = 0
    return group_R


def _integers(values: "pa.Array", column: str) -> _Integers:
    """Integers without nulls as int32 or int64 (R,). Raises DataError for a uint64 beyond int64."""
    import pyarrow as pa

    if pa.types.is_uint64(values.type):
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid as e:
            raise DataError(f"column '{column}': {e}") from e
    return _word(np.from_dlpack(values))


def _word(value_R: npt.NDArray[Any]) -> _Integers:
    return value_R if value_R.dtype in (np.int32, np.int64) else value_R.astype(np.int64)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@numba.njit(nogil=True, cache=True)
def _cut(value_R, cuts, digit_R):  # type: ignore[no-untyped-def]
    """Number of cuts <= value; NaN goes to the digit after the last interval. A SIMD pass a cut."""
    missing = np.int32(len(cuts) + 1)
    for start in range(np.uint64(0), np.uint64(len(value_R)), np.uint64(_PIECE)):
        value, digit = value_R[start : start + np.uint64(_PIECE)], digit_R[start : start + np.uint64(_PIECE)]
        for i in range(len(value)):
            digit[i] = np.int32(0) if value[i] == value[i] else missing
        for cut in cuts:
            for i in range(len(value)):
                digit[i] += np.int32(value[i] >= cut)


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def _subtract(value_R, base, size, digit_R):  # type: ignore[no-untyped-def]
    """Writes value - base; whether all of them lie in [0, size). SIMD code."""
    outside = False
    for i in range(len(value_R)):
        digit = np.int64(value_R[i]) - base
        outside |= (digit < 0) | (digit >= size)
        digit_R[i] = np.int32(digit)
    return not outside


@numba.njit(nogil=True, cache=True)
def _look_up(value_R, base, table, code_R):  # type: ignore[no-untyped-def]
    """Writes table[value - base], -1 beyond the table; whether no code is -1.

    Unsigned indices: one comparison checks both ends, and numba leaves out the wrap-around.
    """
    seen = np.int32(0)
    for i in range(len(value_R)):
        at = np.uint64(np.int64(value_R[i]) - base)
        code = table[at] if at < np.uint64(len(table)) else np.int32(-1)
        code_R[i] = code
        seen |= code
    return seen >= 0


@numba.njit(nogil=True, cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser, the top bits of which are well mixed."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _hash_integers(value_R, group_R):  # type: ignore[no-untyped-def]
    for i in range(len(value_R)):
        group_R[i] = np.uint8(_mix(np.int64(value_R[i])) % np.uint64(GROUPS))


@numba.njit(nogil=True, cache=True)
def _hash_bytes(data, offset_R, group_R):  # type: ignore[no-untyped-def]
    """FNV-1a of each string, then mixed."""
    for i in range(len(group_R)):
        x = np.uint64(0xCBF29CE484222325)
        for j in range(offset_R[i], offset_R[i + 1]):
            x = (x ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        group_R[i] = np.uint8(_mix(x) % np.uint64(GROUPS))
