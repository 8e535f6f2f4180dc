"""Values of Arrow columns as numbers. What is not allowed is refused by row, column and value.

Letters: N rows, V single values of a column over the rows.
"""

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import DenseFeature, SparseFeature
from c2al.data.arrow_types import canonical, flat, float64, is_integral, is_list, numbers
from c2al.data.rows import Floats, Ints
from c2al.errors import DataError


def log1p(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sign(x) * log(1 + |x|)."""
    y = np.abs(x)
    np.log1p(y, out=y)
    return np.copysign(y, x, out=y)


TRANSFORMS = {"log1p": log1p}
"""Transforms that need no statistics."""


def refuse(bad_N: npt.NDArray[np.bool_], values_N: npt.NDArray[np.generic], name: str, rule: str, where: str) -> None:
    """Raises DataError for the first row that is bad: `where`, its row, what is `name`d, its value and the rule."""
    if bad_N.any():
        row = int(np.flatnonzero(bad_N)[0])
        raise DataError(f"{where}, row {row}: column {name} is {values_N[row]}, {rule}")


def refuse_null(array: pa.Array, name: str, where: str, rule: str = "") -> None:
    """Raises DataError naming the first row that is null."""
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {row}: column '{name}' is null{rule}")


def dense_values(column: pa.ChunkedArray, feature: DenseFeature, where: str) -> npt.NDArray[np.float64]:
    """(N,) float64 of a dense column before its transforms, nulls replaced.

    Raises DataError at a null without a replacement and at NaN or infinity, naming the row of the row
    group.
    """
    array = flat(column)
    if feature.null is None:
        declared = " and its feature declares no null value; name one beside its column, e.g. null = 0"
        refuse_null(array, feature.column, where, declared)
    x = float64(array)
    if array.null_count and feature.null is not None:
        x = np.where(array.is_null().to_numpy(zero_copy_only=False), feature.null, x)
    refuse(~np.isfinite(x), x, f"'{feature.column}'", "a dense value must be finite", where)
    return x


def labels(column: pa.ChunkedArray, name: str, where: str) -> Floats:
    """(N,) float32, 0 or 1."""
    label = _numbers(column, name, where)
    refuse((label != 0) & (label != 1), label, f"'{name}'", "a label must be 0 or 1", where)
    return label.astype(np.float32)


def weights(column: pa.ChunkedArray, name: str, where: str) -> Floats:
    """(N,) float32, positive and finite; zero would mark padding."""
    weight = _numbers(column, name, where).astype(np.float32)
    refuse(~((weight > 0) & np.isfinite(weight)), weight, f"'{name}'", "a weight must be positive and finite", where)
    return weight


def _numbers(column: pa.ChunkedArray, name: str, where: str) -> npt.NDArray[np.generic]:
    array = flat(column)
    refuse_null(array, name, where)
    return numbers(array)


def identifiers(column: pa.ChunkedArray, name: str, where: str, is_row_id: bool) -> None:
    """Refuses a row or user id that is null, and a row id that does not fit int64."""
    array = flat(column)
    refuse_null(array, name, where, ": every impression needs one")
    if is_row_id and pa.types.is_uint64(array.type):
        values = array.to_numpy(zero_copy_only=False)
        refuse(values > np.uint64(2**63 - 1), values, f"'{name}'", "a row id must fit int64", where)


def buckets(array: pa.Array, feature: SparseFeature, where: str) -> Ints:
    """(N,) 1 + the number of edges <= value; 0 for null. Raises DataError at NaN.

    Integers are compared as integers, so that the two sides of an edge stay apart beyond 2^53.
    """
    valid_N = array.is_valid().to_numpy(zero_copy_only=False)
    if is_integral(array.type):
        wide = array.cast(pa.uint8()) if pa.types.is_boolean(array.type) else array
        x = wide.fill_null(0).to_numpy(zero_copy_only=False)
        # For integers, edge <= x says the same as ceil(edge) <= x. An edge below or above the type's
        # range lies below or above every value.
        limits = np.iinfo(x.dtype)
        edges = [math.ceil(e) for e in feature.edges]
        below = sum(e < limits.min for e in edges)
        inside = np.array([e for e in edges if limits.min <= e <= limits.max], x.dtype)
        bucket = below + np.searchsorted(inside, x, side="right") + 1
    else:
        x = float64(array)
        refuse(np.isnan(x) & valid_N, x, f"'{feature.column}'", "which lies in no bucket", where)
        bucket = np.searchsorted(np.asarray(feature.edges), x, side="right") + 1
    return np.where(valid_N, bucket, 0).astype(np.int64, copy=False)


def row_of(value: int, ends_N: Ints | None) -> int:
    """The row that holds the value at this position; `ends_N` are the positions after each row's last value.

    None: every row holds one value.
    """
    return value if ends_N is None else int(np.searchsorted(ends_N, value, side="right"))


def vocabulary_values(leaf: pa.Array, column: str, where: str, ends_N: Ints | None) -> pa.Array:
    """Non-null values as int64 or string, the types of a vocabulary. Raises DataError at an integer beyond int64."""
    if pa.types.is_uint64(leaf.type):
        values = leaf.to_numpy(zero_copy_only=False)
        beyond = np.flatnonzero(values > np.uint64(2**63 - 1))
        if len(beyond):
            at = int(beyond[0])
            raise DataError(
                f"{where}, row {row_of(at, ends_N)}: column '{column}' is {values[at]}, beyond int64; "
                "encoding 'hash' takes any 64-bit integer"
            )
    return canonical(leaf)


def leaves(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """Non-null single values of a scalar or list column as int64 or string. Raises DataError at an integer beyond."""
    array = flat(column)
    if is_list(array.type):
        values, length_N = array.flatten(), pc.fill_null(pc.list_value_length(array), 0)
        ends_N = np.cumsum(length_N.to_numpy(zero_copy_only=False), dtype=np.int64)
    else:
        values, ends_N = array, np.arange(1, len(array) + 1)
    if values.null_count:
        known = np.cumsum(values.is_valid().to_numpy(zero_copy_only=False))
        ends_N, values = np.concatenate([[0], known])[ends_N], values.drop_null()
    return vocabulary_values(values, name, where, ends_N)
