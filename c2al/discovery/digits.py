"""Columns of a block -> digits: small integers that stand for the values of one plain axis.

Legend: R rows of a block, D digits of an axis.

A categorical column gets its digits in one of five ways, each a class of its own, from the fastest to
the most general: integers of a narrow range are subtracted from (`NarrowRange`), of a wide range
looked up in a table (`WideRange`), of any range sorted (`AnyIntegers`); strings come as a dictionary,
whose codes are the digits if it is small (`SmallDictionary`) and are looked up if it is not
(`LargeDictionary`). `Categories` picks the way for each block.

A digit means the same value in every block of one layout, whatever the dictionaries of the row groups
are: these differ, so their codes mean nothing beyond one block. Columns become arrays by DLPack, since
pyarrow's `to_numpy` loads pandas (40 MiB).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.compiled import compiled
from c2al.data.arrow_types import is_text
from c2al.data.cohort_codes import Category, axis_problem, numeric
from c2al.errors import CohortError, DataError

_NARROW = 64
"""Widest range of integers, and most entries of a dictionary, that are their own digits."""
_WIDE = 1 << 16
"""Widest range of integers whose digits are looked up in a table instead of by sorting."""
_PIECE = 2048
"""Rows of a block that a kernel of several passes takes at a time: they stay in the first-level cache."""

Digits = npt.NDArray[np.int32]
_Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Encoder(Protocol):
    """Digits of one plain axis."""

    axis: str

    @property
    def size(self) -> int:
        """Digits lie in [0, size)."""

    @property
    def layout(self) -> int:
        """Changes whenever `size` or the meaning of a digit does."""

    def __call__(self, values: pa.Array) -> Digits:
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

    def __call__(self, values: pa.Array) -> Digits:
        value_R = numeric(values, self._column, self.axis)
        digit_R = np.empty(len(value_R), np.int32)
        _cut(value_R, self._cuts, digit_R)
        return digit_R

    def category(self, digit: int) -> Category | None:
        return None if digit == self.size - 1 else digit

    def digits(self, categories: Iterable[Category | None]) -> list[int]:
        return [self.size - 1 if c is None else int(c) for c in categories]


class KnownCategories:
    """The categories of one axis that have a digit: category i has digit i."""

    def __init__(self) -> None:
        self.categories: list[Category] = []
        self.digit: dict[Category, int] = {}
        self.layout = 0

    def add(self, category: Category) -> int:
        """Digit of the category; a new one gets the next digit."""
        digit = self.digit.setdefault(category, len(self.categories))
        if digit == len(self.categories):
            self.categories.append(category)
            self.layout += 1
        return digit

    def replace(self, categories: list[Category]) -> None:
        """Gives out the digits anew. Of equal categories the last one's digit is found by value."""
        self.categories, self.digit = categories, {c: i for i, c in enumerate(categories)}
        self.layout += 1


class NarrowRange:
    """Integers of a range of at most 64: digit = value - lowest value, known or not."""

    def __init__(self, known: KnownCategories, low: int, high: int, kind: type[int] | type[bool]):
        self._low, self._size = low, high - low + 1
        known.replace([kind(v) for v in range(low, high + 1)])

    @property
    def bounds(self) -> tuple[int, int]:
        return self._low, self._low + self._size - 1

    def write(self, value_R: _Integers, digit_R: Digits) -> bool:
        """Writes the digits; whether every value has one."""
        return bool(_subtract(value_R, self._low, self._size, digit_R))

    def table(self) -> Digits:
        """Digit of each value of `bounds`: int32 (high - low + 1,)."""
        return np.arange(self._size, dtype=np.int32)


class WideRange:
    """Integers of a range of at most 65,536: the digit stands in a table, at value - lowest value."""

    def __init__(self, low: int, table: Digits):
        self._low, self._table = low, table

    @property
    def bounds(self) -> tuple[int, int]:
        return self._low, self._low + len(self._table) - 1

    def write(self, value_R: _Integers, digit_R: Digits) -> bool:
        """Writes the digits; whether every value has one."""
        return bool(_look_up(value_R, self._low, self._table, digit_R))

    def table(self) -> Digits:
        """Digit of each value of `bounds`, -1 for none: int32 (high - low + 1,)."""
        return self._table


class AnyIntegers:
    """Digits of integers. Values without a digit get one, and decide which way the next block goes."""

    def __init__(self, known: KnownCategories):
        self._known = known
        self._range: NarrowRange | WideRange | None = None

    def __call__(self, value_R: _Integers, kind: type[int] | type[bool]) -> Digits:
        """Digits of at least one integer: int32 (R,)."""
        digit_R = np.empty(len(value_R), np.int32)
        if self._range is not None and self._range.write(value_R, digit_R):
            return digit_R
        distinct, inverse_R = np.unique(value_R, return_inverse=True)
        low, high = int(distinct[0]), int(distinct[-1])
        if self._range is not None:
            low, high = min(low, self._range.bounds[0]), max(high, self._range.bounds[1])
        if high - low < _NARROW and not isinstance(self._range, WideRange):
            self._range = NarrowRange(self._known, low, high, kind)
        else:
            digit_of_distinct = np.array([self._known.add(kind(v)) for v in distinct.tolist()], np.int32)
            if high - low >= _WIDE:
                return digit_of_distinct[inverse_R]
            self._range = self._widened(low, high, distinct, digit_of_distinct)
        self._range.write(value_R, digit_R)
        return digit_R

    def _widened(self, low: int, high: int, distinct: npt.NDArray[Any], digit_of_distinct: Digits) -> WideRange:
        """The present range and the new values in one table of [low, high]."""
        table = np.full(high - low + 1, -1, np.int32)
        if self._range is not None:
            first, last = self._range.bounds
            table[first - low : last - low + 1] = self._range.table()
        table[distinct - low] = digit_of_distinct
        return WideRange(low, table)


class SmallDictionary:
    """A dictionary of at most 64 strings: its codes are the digits."""

    def __init__(self, known: KnownCategories, texts: list[str]):
        known.replace(list(texts))

    def digits(self, code_R: _Integers) -> Digits:
        return code_R.astype(np.int32, copy=False)


class LargeDictionary:
    """A dictionary of more strings: each entry's digit stands in a table, at its code."""

    def __init__(self, known: KnownCategories, texts: list[str]):
        self._table = np.array([known.add(text) for text in texts], np.int32)

    def digits(self, code_R: _Integers) -> Digits:
        digit_R = np.empty(len(code_R), np.int32)
        _look_up(code_R, 0, self._table, digit_R)
        return digit_R


class Texts:
    """Digits of strings. A dictionary is read once, as long as the next blocks bring the same."""

    def __init__(self, known: KnownCategories):
        self._known = known
        self._dictionary: pa.Array | None = None
        self._way: SmallDictionary | LargeDictionary = LargeDictionary(known, [])

    def __call__(self, values: pa.DictionaryArray) -> Digits:
        """Digits of dictionary-encoded strings: int32 (R,). What stands where there is null means nothing."""
        if self._dictionary is None or not self._dictionary.equals(values.dictionary):
            texts = values.dictionary.to_pylist()
            self._dictionary = values.dictionary
            self._way = (SmallDictionary if len(texts) <= _NARROW else LargeDictionary)(self._known, texts)
        code_R = _word(np.from_dlpack(values.indices.fill_null(0) if values.null_count else values.indices))
        return self._way.digits(code_R)


class Categories:
    """Digits of an int, string, dictionary or bool column; the last one is null.

    Raises CohortError naming axis and column for a column of another type, DataError naming the value
    for an integer beyond int64 and a string that is not UTF-8.
    """

    def __init__(self, column: str, axis: str):
        self._column, self.axis = column, axis
        self._known = KnownCategories()
        self._integers, self._texts = AnyIntegers(self._known), Texts(self._known)

    @property
    def size(self) -> int:
        return len(self._known.categories) + 1

    @property
    def layout(self) -> int:
        return self._known.layout

    def __call__(self, values: pa.Array) -> Digits:
        if pa.types.is_dictionary(values.type) and (
            not is_text(values.type.value_type) or values.dictionary.null_count
        ):
            values = values.dictionary_decode()
        if values.null_count == len(values):
            return np.full(len(values), self.size - 1, np.int32)
        digit_R = self._of_type(values)
        if values.null_count:
            null_R = values.is_null().to_numpy(zero_copy_only=False)
            digit_R = np.where(null_R, np.int32(self.size - 1), digit_R)
        return digit_R

    def _of_type(self, values: pa.Array) -> Digits:
        """Digits of a column that is not all null; what stands where there is null means nothing."""
        if pa.types.is_boolean(values.type):
            return self._integers(self._filled(values.cast(pa.uint8())), bool)
        if pa.types.is_integer(values.type):
            return self._integers(self._filled(values), int)
        if pa.types.is_dictionary(values.type) or is_text(values.type):
            try:
                return self._texts(values if pa.types.is_dictionary(values.type) else values.dictionary_encode())
            except UnicodeDecodeError as e:
                where = f"axis '{self.axis}': column '{self._column}'"
                raise DataError(f"{where} holds a string that is not UTF-8: {e.object[:80]!r}") from e
        wrong = axis_problem("categorical", values.type)
        raise CohortError(f"axis '{self.axis}': column '{self._column}' {wrong}")

    def _filled(self, values: pa.Array) -> _Integers:
        """Integers as int32 or int64 (R,), with a value that occurs in place of null."""
        if pa.types.is_uint64(values.type):
            values = _signed(values, f"axis '{self.axis}': column '{self._column}'")
        return _word(np.from_dlpack(values.fill_null(values.drop_null()[0]) if values.null_count else values))

    def category(self, digit: int) -> Category | None:
        return None if digit == self.size - 1 else self._known.categories[digit]

    def digits(self, categories: Iterable[Category | None]) -> list[int]:
        null, of = self.size - 1, self._known.digit
        return [null if c is None else of.get(c, -1) for c in categories]


def _signed(values: pa.Array, what: str) -> pa.Array:
    """uint64 as int64. Raises DataError naming the first value beyond it: cohorts.json holds int64."""
    number_R = np.from_dlpack(values.fill_null(0) if values.null_count else values)
    beyond_R = number_R > np.uint64(2**63 - 1)
    if beyond_R.any():
        raise DataError(f"{what} holds {number_R[beyond_R][0]}, a category must fit int64 (at most {2**63 - 1})")
    return values.cast(pa.int64())


def _word(value_R: npt.NDArray[Any]) -> _Integers:
    return value_R if value_R.dtype in (np.int32, np.int64) else value_R.astype(np.int64)


@compiled()
def _cut(value_R, cuts, digit_R):  # type: ignore[no-untyped-def]
    """Number of cuts <= value; NaN goes to the digit after the last interval. One SIMD pass per cut."""
    missing = np.int32(len(cuts) + 1)
    for start in range(np.uint64(0), np.uint64(len(value_R)), np.uint64(_PIECE)):
        value, digit = value_R[start : start + np.uint64(_PIECE)], digit_R[start : start + np.uint64(_PIECE)]
        for i in range(len(value)):
            digit[i] = np.int32(0) if value[i] == value[i] else missing
        for cut in cuts:
            for i in range(len(value)):
                digit[i] += np.int32(value[i] >= cut)


@compiled()
def _subtract(value_R, base, size, digit_R):  # type: ignore[no-untyped-def]
    """Writes value - base; whether all of them lie in [0, size). SIMD code."""
    outside = False
    for i in range(len(value_R)):
        digit = np.int64(value_R[i]) - base
        outside |= (digit < 0) | (digit >= size)
        digit_R[i] = np.int32(digit)
    return not outside


@compiled()
def _look_up(value_R, base, table, digit_R):  # type: ignore[no-untyped-def]
    """Writes table[value - base], -1 beyond the table; whether no digit is -1.

    Unsigned indices: one comparison checks both ends, and numba leaves out the wrap-around.
    """
    seen = np.int32(0)
    for i in range(len(value_R)):
        at = np.uint64(np.int64(value_R[i]) - base)
        digit = table[at] if at < np.uint64(len(table)) else np.int32(-1)
        digit_R[i] = digit
        seen |= digit
    return seen >= 0
