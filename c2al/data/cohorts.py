"""Cohorts: which impressions belong to the head, to the tail, or to a segment of an axis.

``discover`` writes ``cohorts.json``; training, evaluation and the report read it through this
module. A cohort is a conjunction of conditions on columns:

- equals: the column holds this int, string or bool;
- interval: lower <= float32(value) < upper, a missing bound is open (NaN belongs to no interval);
- null: the column holds null, or NaN.

Source: C2AL Sec. 3 (cohorts C_head, C_tail along semantic axes). pyarrow is imported when a table
is at hand, so that this module needs numpy alone.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from c2al.errors import CohortError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, VERSION = "c2al.cohorts", 2
"""Of cohorts.json; a file of another version is refused."""

Category = bool | int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """One test of one column: exactly one of `equals`, an interval, or `null`."""

    column: str
    equals: Category | None = None
    lower: float | None = None
    """Inclusive, compared as float32; None with an `upper` only: unbounded below."""
    upper: float | None = None
    """Exclusive; None: unbounded above."""
    null: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields that say something; an interval always has both bounds."""
        if self.null:
            return {"column": self.column, "null": True}
        if self.equals is not None:
            return {"column": self.column, "equals": self.equals}
        return {"column": self.column, "lower": self.lower, "upper": self.upper}

    @classmethod
    def from_json(cls, value: Any, source: str) -> "Condition":
        """Strict inverse of `to_json`. Raises CohortError naming `source`."""
        if isinstance(value, dict) and isinstance(value.get("column"), str):
            column, rest = value["column"], {k: v for k, v in value.items() if k != "column"}
            if rest == {"null": True}:
                return cls(column=column, null=True)
            if set(rest) == {"equals"} and isinstance(rest["equals"], bool | int | str):
                return cls(column=column, equals=rest["equals"])
            if set(rest) == {"lower", "upper"} and all(b is None or _is_number(b) for b in rest.values()):
                return cls(column=column, **rest)
        raise CohortError(f"{source}: {value!r} is not a condition")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """The impressions that meet every condition."""

    axis: str
    name: str
    """Unique within its axis; for people. The conditions are what counts."""
    conditions: tuple[Condition, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns a table needs for `membership`."""
        return tuple(dict.fromkeys(c.column for c in self.conditions))

    def membership(self, table: "pa.Table | pa.RecordBatch") -> npt.NDArray[np.bool_]:
        """Which of the table's R rows belong to the cohort: bool (R,).

        Raises CohortError naming a column that is missing or of another kind than the conditions.
        """
        codes_R = AxisCohorts(name=self.axis, columns=self.columns, cohorts=(self,)).codes(table)
        return np.equal(codes_R, 0)

    def to_json(self) -> dict[str, Any]:
        return {"axis": self.axis, "name": self.name, "conditions": [c.to_json() for c in self.conditions]}

    @classmethod
    def from_json(cls, value: Any, source: str) -> "CohortSpec":
        """Strict inverse of `to_json`; further keys (a cohort's statistics) are ignored."""
        known = isinstance(value, dict) and isinstance(value.get("axis"), str) and isinstance(value.get("name"), str)
        if not known or not isinstance(value.get("conditions"), list) or not value["conditions"]:
            raise CohortError(f"{source}: a cohort needs 'axis', 'name' and 'conditions', got {value!r}")
        conditions = tuple(Condition.from_json(c, source) for c in value["conditions"])
        return cls(axis=value["axis"], name=value["name"], conditions=conditions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisCohorts:
    """The disjoint cohorts of one axis."""

    name: str
    columns: tuple[str, ...]
    cohorts: tuple[CohortSpec, ...]

    def codes(self, table: "pa.Table | pa.RecordBatch") -> npt.NDArray[np.int32]:
        """Index into `cohorts` of each of the table's R rows: int32 (R,); -1 where none fits.

        -1 marks a category that discovery has not seen, or a combination of a cross that it has not.
        Raises CohortError naming a column that is missing or of another kind than the conditions.
        """
        key_R = np.zeros(table.num_rows, np.int64)
        known_R = np.ones(table.num_rows, np.bool_)
        for column, conditions in self._conditions.items():
            code_R = _column_codes(table, column, conditions, self.name)
            known_R &= code_R >= 0
            key_R = key_R * len(conditions) + code_R
        keys_C, cohort_C = self._keys
        slot_R = np.minimum(np.searchsorted(keys_C, key_R), len(keys_C) - 1)
        known_R &= keys_C[slot_R] == key_R
        return np.where(known_R, cohort_C[slot_R], np.int32(-1))

    @functools.cached_property
    def _conditions(self) -> dict[str, list[Condition]]:
        """Column -> its distinct conditions, in the order of the cohorts."""
        return {
            column: list(dict.fromkeys(c for cohort in self.cohorts for c in cohort.conditions if c.column == column))
            for column in self.columns
        }

    @functools.cached_property
    def _keys(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Sorted mixed-radix keys of the cohorts' conditions, and the cohort of each."""
        index = {column: {c: i for i, c in enumerate(cs)} for column, cs in self._conditions.items()}
        keys = np.zeros(len(self.cohorts), np.int64)
        for column, conditions in self._conditions.items():
            own = [next(c for c in cohort.conditions if c.column == column) for cohort in self.cohorts]
            keys = keys * len(conditions) + np.array([index[column][c] for c in own])
        order = np.argsort(keys)
        return keys[order], order.astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohorts:
    """What `discover` found: the cohorts of every axis, and head and tail if a pair was chosen."""

    head: CohortSpec | None
    """The cohort of the chosen pair with more rows."""
    tail: CohortSpec | None
    reason: str
    """Why this pair, or why none."""
    axes: tuple[AxisCohorts, ...]
    version: int = VERSION

    def chosen(self) -> tuple[CohortSpec, CohortSpec]:
        """(head, tail). Raises CohortError with the reason when nothing was chosen."""
        if self.head is None or self.tail is None:
            raise CohortError(f"no head and tail cohort was chosen: {self.reason}")
        return self.head, self.tail


def read_cohorts(path: str | os.PathLike[str]) -> Cohorts:
    """Reads cohorts.json. Raises CohortError naming the file and what is wrong with it."""
    source = str(path)
    try:
        with open(path, encoding="utf-8") as f:
            tree = json.load(f)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CohortError(f"{source}: not a readable cohorts.json: {e}") from e
    found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CohortError(f"{source}: version is {found!r}, this c2al reads version {VERSION} of {FORMAT!r}")
    try:
        chosen, axes = tree["chosen"], tree["axes"]
        head, tail = (None if chosen[k] is None else CohortSpec.from_json(chosen[k], source) for k in ("head", "tail"))
        return Cohorts(head=head, tail=tail, reason=chosen["reason"], axes=tuple(_axis(a, source) for a in axes))
    except (KeyError, TypeError) as e:
        raise CohortError(f"{source}: not a cohorts.json of version {VERSION}: {e!r}") from e


def _axis(tree: dict[str, Any], source: str) -> AxisCohorts:
    name, columns = tree["name"], tuple(tree["columns"])
    cohorts = tuple(CohortSpec.from_json({"axis": name, **c}, source) for c in tree["cohorts"])
    if not cohorts:
        raise CohortError(f"{source}: axis '{name}' has no cohorts")
    for cohort in cohorts:
        if sorted(c.column for c in cohort.conditions) != sorted(columns):
            raise CohortError(
                f"{source}: axis '{name}', cohort '{cohort.name}': has not one condition on each of {columns}"
            )
    if len({frozenset(c.conditions) for c in cohorts}) < len(cohorts):
        raise CohortError(f"{source}: axis '{name}': two cohorts have the same conditions")
    return AxisCohorts(name=name, columns=columns, cohorts=cohorts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _column_codes(
    table: "pa.Table | pa.RecordBatch", column: str, conditions: Sequence[Condition], axis: str
) -> npt.NDArray[np.int64]:
    """Index into `conditions`, disjoint, of each row: int64 (R,); -1 where none holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in table.schema.names:
        raise CohortError(f"axis '{axis}': column '{column}' is missing, there are {table.schema.names}")
    values = table.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    code_R = np.full(table.num_rows, -1, np.int64)

    categories = [(i, c.equals) for i, c in enumerate(conditions) if c.equals is not None]
    if categories:
        _check_kind(values.type, {type(v) for _, v in categories}, column, axis)
        seen = pc.index_in(values, value_set=pa.array([v for _, v in categories], values.type))
        lookup = np.array([i for i, _ in categories] + [-1], np.int64)
        code_R = lookup[pc.fill_null(seen, len(categories)).to_numpy(zero_copy_only=False)]

    intervals = sorted(
        (-math.inf if c.lower is None else c.lower, math.inf if c.upper is None else c.upper, i)
        for i, c in enumerate(conditions)
        if c.equals is None and not c.null
    )
    null_R = pc.is_null(values, nan_is_null=True).to_numpy(zero_copy_only=False)
    if intervals:
        value_R = numeric(values, column, axis)
        lower, upper = (np.array([t[k] for t in intervals], np.float32) for k in (0, 1))
        slot_R = np.maximum(np.searchsorted(lower, value_R, side="right") - 1, 0)
        # The last interval is closed: an open upper end takes +inf in.
        inside_R = (value_R >= lower[slot_R]) & ((value_R < upper[slot_R]) | np.isposinf(upper[slot_R])) & ~null_R
        code_R = np.where(inside_R, np.array([t[2] for t in intervals])[slot_R], code_R)

    for i, condition in enumerate(conditions):
        if condition.null:
            code_R = np.where(null_R, i, code_R)
    return code_R


def numeric(values: "pa.Array | pa.ChunkedArray", column: str, axis: str) -> npt.NDArray[np.float32]:
    """The values of a numeric axis as float32 (R,), null as NaN; how cuts are compared everywhere.

    Raises CohortError for a column that is neither integer nor floating.
    """
    import pyarrow as pa

    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise CohortError(f"axis '{axis}': column '{column}' is {values.type}, percentiles and edges need a number")
    plain = isinstance(values, pa.Array) and not values.null_count
    raw_R = np.from_dlpack(values) if plain else values.to_numpy(zero_copy_only=False)
    if pa.types.is_integer(values.type):
        raw_R = raw_R.astype(np.float64)  # as pyarrow does where there are nulls; one rounding rule for both
    return np.asarray(raw_R, np.float32)


def _check_kind(found: "pa.DataType", wanted: set[type], column: str, axis: str) -> None:
    import pyarrow as pa

    fits = {
        bool: pa.types.is_boolean,
        int: pa.types.is_integer,
        str: lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
    }
    for kind in wanted:
        if not fits[kind](found):
            raise CohortError(
                f"axis '{axis}': column '{column}' is {found}, the cohorts compare it with a {kind.__name__}"
            )
