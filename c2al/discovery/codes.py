"""Columns of a block -> small integers: cohort numbers of an axis, jackknife groups of users.

Legend: R rows of a block. An encoder numbers the cohorts of its axis as they appear, by value:
dictionary codes differ from row group to row group and mean nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from c2al.cohorts import Category, numeric
from c2al.discovery.histogram import GROUPS, Key
from c2al.errors import CohortError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_SPAN = 1 << 16
"""Widest range of integer categories that is looked up in a table instead of being sorted."""
_COMBINATIONS = 1 << 24

_Codes = npt.NDArray[np.int32]
_Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Encoder(Protocol):
    """Numbers the cohorts of one plain axis."""

    keys: list[Key]
    """The cohort of each number given out so far."""

    def __call__(self, values: "pa.Array") -> _Codes:
        """Cohort numbers of the values: int32 (R,), indices into `keys`."""


class Intervals:
    """Numbers a numeric column by ascending cuts; key (i,) is [cut i-1, cut i), key (None,) null or NaN."""

    def __init__(self, cuts: Sequence[float], column: str, axis: str):
        self._cuts = np.array(cuts, np.float32)
        self._column, self._axis = column, axis
        self.keys: list[Key] = [*((i,) for i in range(len(cuts) + 1)), (None,)]

    def __call__(self, values: "pa.Array") -> _Codes:
        value_R = numeric(values, self._column, self._axis)
        code_R = np.empty(len(value_R), np.int32)
        _cut(value_R, self._cuts, code_R)
        return code_R


class Categories:
    """Numbers the values of an int, string, dictionary or bool column; null is one of them.

    Raises CohortError for a column of another type and when there are more than `cap` categories.
    """

    def __init__(self, column: str, axis: str, cap: int):
        self._column, self._axis, self._cap = column, axis, cap
        self.keys: list[Key] = []
        self._number: dict[Category | None, int] = {}
        self._dictionary: pa.Array | None = None
        self._base = 0
        self._table = np.empty(0, np.int32)
        """Number of category base + i for integers, of dictionary entry i otherwise; -1: not seen."""

    def __call__(self, values: "pa.Array") -> _Codes:
        import pyarrow as pa
        import pyarrow.compute as pc

        if values.null_count == len(values):
            return np.full(len(values), self._add(None) if len(values) else 0, np.int32)
        if pa.types.is_dictionary(values.type) and not _is_text(values.type.value_type):
            values = values.dictionary_decode()
        null_R = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
        if pa.types.is_boolean(values.type):
            two = pc.fill_null(values, False).cast(pa.uint8()).to_numpy().astype(np.int64)
            code_R = self._integers(two if null_R is None else two[~null_R], bool)
        elif pa.types.is_integer(values.type):
            present = values if null_R is None else values.drop_null()
            code_R = self._integers(_integers(present, self._column), int)
        elif pa.types.is_dictionary(values.type) or _is_text(values.type):
            present = values if null_R is None else values.drop_null()
            code_R = self._texts(present if pa.types.is_dictionary(values.type) else present.dictionary_encode())
        else:
            raise CohortError(
                f"axis '{self._axis}': column '{self._column}' is {values.type}; a categorical axis needs integers, "
                "strings or bools (a number can be cut by percentiles or edges)"
            )
        if null_R is None:
            return code_R
        whole_R = np.full(len(values), self._add(None), np.int32)
        whole_R[~null_R] = code_R
        return whole_R

    def _integers(self, value_R: _Integers, kind: type[int] | type[bool]) -> _Codes:
        code_R = np.empty(len(value_R), np.int32)
        if _look_up(value_R, self._base, self._table, code_R):
            return code_R
        new = np.unique(value_R[code_R < 0]).tolist()
        span = [new[0], new[-1]] + ([self._base, self._base + len(self._table) - 1] if len(self._table) else [])
        if max(span) - min(span) >= _SPAN:
            distinct, inverse = np.unique(value_R, return_inverse=True)
            return np.array([self._add(kind(v)) for v in distinct.tolist()], np.int32)[inverse]
        table = np.full(max(span) - min(span) + 1, -1, np.int32)
        table[self._base - min(span) :][: len(self._table)] = self._table
        self._base, self._table = min(span), table
        return _number(value_R, self._base, table, lambda value: self._add(kind(value)))

    def _texts(self, values: "pa.DictionaryArray") -> _Codes:
        if self._dictionary is None or not self._dictionary.equals(values.dictionary):
            self._dictionary, self._table = values.dictionary, np.full(len(values.dictionary), -1, np.int32)
        index_R = _word(values.indices.to_numpy())
        return _number(index_R, 0, self._table, lambda i: self._add(values.dictionary[i].as_py()))

    def _add(self, category: Category | None) -> int:
        number = self._number.setdefault(category, len(self._number))
        if number == len(self.keys):
            check_cap(number + 1, self._cap, self._axis)
            self.keys.append((category,))
        return number


class Cross:
    """Numbers the combinations of two or three encoders' cohorts that occur.

    Raises CohortError beyond the cap, or when the parts' cohorts have 2^24 combinations or more.
    """

    def __init__(self, parts: Sequence[Encoder], axis: str, cap: int):
        self._parts, self._axis, self._cap = parts, axis, cap
        self.keys: list[Key] = []
        self._sizes: tuple[int, ...] = ()
        self._table = np.empty(0, np.int32)
        """Number of each combination, in row-major order of `_sizes`; -1: not seen."""
        self._combination = np.empty(0, np.int32)

    def __call__(self, codes: Sequence[_Codes]) -> _Codes:
        """Numbers of the combinations of the parts' numbers: int32 (R,), indices into `keys`."""
        if any(len(p.keys) > s for p, s in zip(self._parts, self._sizes or (0,) * len(codes), strict=True)):
            self._resize()
        if len(self._combination) < len(codes[0]):
            self._combination = np.empty(len(codes[0]), np.int32)
        combination_R = self._combination[: len(codes[0])]
        _fold(codes[0], np.int32(self._sizes[1]), codes[1], combination_R)
        for size, part_R in zip(self._sizes[2:], codes[2:], strict=True):
            _fold(combination_R, np.int32(size), part_R, combination_R)
        return _number(combination_R, 0, self._table, self._add)

    def _resize(self) -> None:
        """Lays the table out for twice the parts' present cohorts."""
        sizes = tuple(2 * len(p.keys) for p in self._parts)
        if math.prod(sizes) >= _COMBINATIONS:
            raise CohortError(
                f"axis '{self._axis}' crosses {' x '.join(str(len(p.keys)) for p in self._parts)} cohorts, "
                f"more combinations than discovery can number"
            )
        table = np.full(sizes, -1, np.int32)
        if self._sizes:
            table[tuple(slice(s) for s in self._sizes)] = self._table.reshape(self._sizes)
        self._sizes, self._table = sizes, table.reshape(-1)

    def _add(self, combination: int) -> int:
        check_cap(len(self.keys) + 1, self._cap, self._axis)
        index = np.unravel_index(combination, self._sizes)
        self.keys.append(tuple(part.keys[int(i)][0] for part, i in zip(self._parts, index, strict=True)))
        return len(self.keys) - 1


def _number(value_R: _Integers, base: int, table: npt.NDArray[np.int32], add: Callable[[int], int]) -> _Codes:
    """table[value_R - base]; where the table has -1, `add` gives the value's number."""
    code_R = np.empty(len(value_R), np.int32)
    if not _look_up(value_R, base, table, code_R):
        for value in np.unique(value_R[code_R < 0]).tolist():
            table[value - base] = add(value)
        _look_up(value_R, base, table, code_R)
    return code_R


def check_cap(cohorts: int, cap: int, axis: str) -> None:
    """Raises CohortError naming the axis that has more cohorts than the cap."""
    if cohorts > cap:
        raise CohortError(f"axis '{axis}' has more than {cap} cohorts (discover.max_cohorts)")


def user_groups(users: "pa.Array", column: str) -> npt.NDArray[np.uint8]:
    """Jackknife group of each row, a hash of its user's integer or string: uint8 (R,), below G.

    Equal users share a group in every file, whatever their encoding. All rows without a user count
    as one user. Raises DataError naming the column if it is neither integer nor string.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(users.type):
        of_entry = user_groups(users.dictionary, column)
        entry_R = users.indices.fill_null(len(of_entry)).to_numpy()
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
    return _word(values.to_numpy())


def _word(value_R: npt.NDArray[Any]) -> _Integers:
    return value_R if value_R.dtype in (np.int32, np.int64) else value_R.astype(np.int64)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@numba.njit(nogil=True, cache=True)
def _cut(value_R, cuts, code_R):  # type: ignore[no-untyped-def]
    """Number of cuts <= value; NaN goes to the number after the last interval. A SIMD pass a cut."""
    missing = np.int32(len(cuts) + 1)
    for i in range(len(value_R)):
        code_R[i] = np.int32(0) if value_R[i] == value_R[i] else missing
    for cut in cuts:
        for i in range(len(value_R)):
            code_R[i] += np.int32(value_R[i] >= cut)


@numba.njit(nogil=True, cache=True)
def _fold(code_R, size, part_R, combination_R):  # type: ignore[no-untyped-def]
    """A further digit of the row-major index. numpy's two temporaries cost 2 ns a row, this 0.3."""
    for i in range(len(code_R)):
        combination_R[i] = code_R[i] * size + part_R[i]


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
