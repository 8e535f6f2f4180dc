"""Which condition of a cohort each row of a column meets: categories, cuts of numbers, draws of users."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.data.arrow_types import category, decoded, flat, float32_rounded_down, float64, is_list, is_text, plain
from c2al.data.hashing import drawn_share
from c2al.errors import CohortError

if TYPE_CHECKING:
    from c2al.data.cohorts import Condition

Category = bool | int | str


def column_codes(
    table: pa.Table | pa.RecordBatch, column: str, conditions: Sequence["Condition"], axis: str
) -> npt.NDArray[np.int64]:
    """Index into `conditions`, disjoint, of each row: int64 (R,); -1 where none holds."""
    if (count := table.schema.names.count(column)) != 1:
        there = f"is there {count} times" if count else f"is missing, there are {table.schema.names}"
        raise CohortError(f"axis '{axis}': column '{column}' {there}")
    values = plain(table.column(column))
    code_R = np.full(table.num_rows, -1, np.int64)

    categories = [(i, c.equals) for i, c in enumerate(conditions) if c.equals is not None]
    if categories:
        code_R = _category_codes(values, categories, column, axis)

    intervals = sorted(
        (-math.inf if c.lower is None else c.lower, math.inf if c.upper is None else c.upper, i)
        for i, c in enumerate(conditions)
        if c.equals is None and not c.null
    )
    null_R = pc.is_null(values, nan_is_null=True).to_numpy(zero_copy_only=False)
    if intervals:
        draw = conditions[intervals[0][2]].draw
        if draw is not None and category(values.type) is None:
            raise CohortError(
                f"axis '{axis}': column '{column}' is {values.type}; users are drawn by integers or strings"
            )
        value_R = numeric(values, column, axis) if draw is None else drawn_share(values, draw)
        lower, upper = (np.array([t[k] for t in intervals], np.float32) for k in (0, 1))
        slot_R = np.maximum(np.searchsorted(lower, value_R, side="right") - 1, 0)
        # The last interval is closed: an open upper end takes +inf in.
        inside_R = (value_R >= lower[slot_R]) & ((value_R < upper[slot_R]) | np.isposinf(upper[slot_R])) & ~null_R
        code_R = np.where(inside_R, np.array([t[2] for t in intervals])[slot_R], code_R)

    for i, condition in enumerate(conditions):
        if condition.null:
            code_R = np.where(null_R, i, code_R)
    return code_R


def _category_codes(
    values: pa.Array | pa.ChunkedArray, categories: Sequence[tuple[int, Category]], column: str, axis: str
) -> npt.NDArray[np.int64]:
    """The number that goes with each row's value: int64 (R,); -1 where it is none of the categories."""
    fits = {bool: pa.types.is_boolean, int: pa.types.is_integer, str: is_text}
    for kind in {type(v) for _, v in categories}:
        if not fits[kind](values.type):
            raise CohortError(
                f"axis '{axis}': column '{column}' is {values.type}, the cohorts compare it with a {kind.__name__}"
            )
    if pa.types.is_integer(values.type):
        # A narrow column cannot hold every category; in 64 bits only a negative one has no place.
        unsigned = pa.types.is_uint64(values.type)
        values = values if unsigned else values.cast(pa.int64())
        categories = [(i, v) for i, v in categories if not unsigned or int(v) >= 0]
    seen = pc.index_in(values, value_set=pa.array([v for _, v in categories], values.type))
    lookup = np.array([i for i, _ in categories] + [-1], np.int64)
    codes: npt.NDArray[np.int64] = lookup[pc.fill_null(seen, len(categories)).to_numpy(zero_copy_only=False)]
    return codes


def axis_problem(kind: str, type_: pa.DataType) -> str:
    """Why a column of this type cannot be an axis of this kind (Axis.kind); empty if it can."""
    single = decoded(type_)
    if kind == "categorical":
        fits = not is_list(single) and category(single) is not None
        needed = "integers, strings or bools (a number can be cut by percentiles or edges)"
        return "" if fits else f"is {type_}; a categorical axis needs {needed}"
    fits = pa.types.is_integer(single) or pa.types.is_floating(single)
    return "" if fits else f"is {type_}, percentiles and edges need a number"


def numeric(values: pa.Array | pa.ChunkedArray, column: str, axis: str) -> npt.NDArray[np.float32]:
    """The values of a numeric axis as float32 (R,), null as NaN; how cuts are compared everywhere.

    Floats are rounded to the nearest float32, as the cuts are. Integers are rounded down: value >= cut
    then holds of the rounded value exactly when it holds of the integer, since a cut is a float32.
    Raises CohortError for a column that is neither integer nor floating.
    """
    values = flat(plain(values))
    if pa.types.is_integer(values.type):
        return float32_rounded_down(values)
    if wrong := axis_problem("edges", values.type):
        raise CohortError(f"axis '{axis}': column '{column}' {wrong}")
    raw_R = float64(values) if values.null_count else np.from_dlpack(values)
    with np.errstate(over="ignore"):  # Beyond float32 is infinity, which lies in the last interval.
        return np.asarray(raw_R, np.float32)
