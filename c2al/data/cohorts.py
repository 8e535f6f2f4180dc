"""Cohorts: which impressions belong to the head, to the tail, or to a segment of an axis.

``discover`` writes ``cohorts.json``; training, evaluation and the report read it through this
module. A cohort is a conjunction of conditions on columns:

- equals: the column holds this int, string or bool;
- interval: lower <= float32(value) < upper, a missing bound is open (NaN belongs to no interval). An
  integer that is no float32 is rounded down, so the bounds, which are float32, divide integers exactly;
- null: the column holds null, or NaN;
- draw: a random share of the column's values, for placebos: lower <= h < upper, where h in [0, 1) is a
  hash of the value and of the number of the draw.

Source: C2AL Sec. 3 (cohorts C_head, C_tail along semantic axes).
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.data.cohort_codes import column_codes
from c2al.errors import CohortError
from c2al.files import write_atomically
from c2al.state import read_json
from c2al.text import terminal
from c2al.typed import INT64, Problems, build, hint

FORMAT, VERSION = "c2al.cohorts", 2
"""Of cohorts.json; a file of another format or version is refused."""

MOST_COHORTS = 2**20
"""Cohorts of one axis that a file may hold: beyond any axis that is useful, within memory."""

STATISTICS = ("rows", "positives", "positive_rate", "mean_prediction", "calibration", "ne", "undefined")
"""What discovery writes beside a cohort for people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """One test of one column: exactly one of `equals`, an interval (of the values, or of a draw), or `null`."""

    column: str
    equals: bool | int | str | None = None
    lower: float | None = None
    """Inclusive, compared as float32; None with an `upper` only: unbounded below."""
    upper: float | None = None
    """Exclusive; None: unbounded above."""
    null: bool = False
    draw: int | None = None
    """Number of a random draw; the bounds are then shares of the values, from 0 to 1."""

    def to_json(self) -> dict[str, Any]:
        """The fields that say something; an interval always has both bounds."""
        if self.null:
            return {"column": self.column, "null": True}
        if self.equals is not None:
            return {"column": self.column, "equals": self.equals}
        bounds = {"lower": self.lower, "upper": self.upper}
        return {"column": self.column, **({} if self.draw is None else {"draw": self.draw}), **bounds}

    def problems(self) -> Problems:
        if self.equals is not None and (self.null or self.lower is not None or self.upper is not None):
            yield "equals", "does not go with a bound or with null"
        if self.null and (self.lower is not None or self.upper is not None):
            yield "null", "does not go with a bound"
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            yield "lower", f"is {self.lower}, not below the upper bound {self.upper}"
        if self.draw is not None and (self.lower is None or self.upper is None or self.draw < 0):
            yield "draw", "must not be negative and needs both bounds"

    @classmethod
    def from_json(cls, value: Any, source: str) -> "Condition":
        """Strict inverse of `to_json`. Raises CohortError naming `source`."""
        problems: list[str] = []
        condition = build(cls, value, "", problems)
        if not problems and set(value) != set(condition.to_json()):
            problems.append(f"has the keys {', '.join(sorted(value))}")
        if problems:
            raise CohortError(f"{source}: {_short(value)} is not a condition: {'; '.join(problems)}")
        return condition  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """The impressions that meet every condition."""

    axis: str
    name: str
    """Unique within its axis; for people. The conditions are what counts."""
    conditions: tuple[Condition, ...]
    label: str = ""
    """Its name among the chosen cohorts, e.g. "head"; empty: not chosen."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns a table needs for `membership`."""
        return tuple(dict.fromkeys(c.column for c in self.conditions))

    def membership(self, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Which of the table's R rows belong to the cohort: bool (R,).

        Raises CohortError naming a column that is missing or of another kind than the conditions.
        """
        codes_R = AxisCohorts(name=self.axis, columns=self.columns, cohorts=(self,)).codes(table)
        return np.equal(codes_R, 0)

    def to_json(self) -> dict[str, Any]:
        return {"axis": self.axis, "name": self.name, "conditions": [c.to_json() for c in self.conditions]}

    @classmethod
    def from_json(cls, value: Any, source: str) -> "CohortSpec":
        """Strict inverse of `to_json`; a cohort's statistics may stand beside it and are not read."""
        named = isinstance(value, dict) and all(_is_name(value.get(key)) for key in ("axis", "name"))
        if not named or not isinstance(value.get("conditions"), list) or not value["conditions"]:
            raise CohortError(f"{source}: a cohort needs 'axis', 'name' and 'conditions', got {_short(value)}")
        _refuse_unknown(value, ("axis", "name", "conditions", *STATISTICS), f"cohort '{value['name']}'", source)
        conditions = tuple(Condition.from_json(c, source) for c in value["conditions"])
        columns = [c.column for c in conditions]
        for column in sorted({c for c in columns if columns.count(c) > 1}):
            raise CohortError(
                f"{source}: cohort '{terminal(value['name'])}': two conditions on column '{terminal(column)}'; one may "
                "have 'lower' and 'upper' both"
            )
        return cls(axis=value["axis"], name=value["name"], conditions=conditions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisCohorts:
    """The disjoint cohorts of one axis."""

    name: str
    columns: tuple[str, ...]
    cohorts: tuple[CohortSpec, ...]

    def codes(self, table: pa.Table | pa.RecordBatch) -> npt.NDArray[np.int32]:
        """Index into `cohorts` of each of the table's R rows: int32 (R,); -1 where none fits.

        -1 marks a category that discovery has not seen, or a combination of a cross that it has not.
        Raises CohortError naming a column that is missing or of another kind than the conditions.
        """
        key_R = np.zeros(table.num_rows, np.int64)
        known_R = np.ones(table.num_rows, np.bool_)
        for column, conditions in self._conditions.items():
            code_R = column_codes(table, column, conditions, self.name)
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
    """What `discover` found: the cohorts of every axis, and those chosen for auxiliary tasks."""

    named: tuple[CohortSpec, ...]
    """The chosen cohorts, each with its label. The paper's pair: head, the one with more rows, and tail.
    Empty when none could be chosen."""
    reason: str
    """Why these cohorts, or why none."""
    axes: tuple[AxisCohorts, ...]
    version: int = VERSION

    def chosen(self) -> tuple[CohortSpec, ...]:
        """The chosen cohorts, at least one. Raises CohortError with the reason when there is none."""
        if not self.named:
            raise CohortError(f"no cohorts were chosen: {self.reason}")
        return self.named


PAIR_LABELS = ("head", "tail")
"""What the two cohorts are called that discovery chooses, and those that stand in their place."""
RESERVED_LABELS = ("primary", "all", "overall")
"""Names that metrics and results give to something else."""
LABEL = re.compile(r"[A-Za-z0-9_-]+")


def write_cohorts(path: str | os.PathLike[str], cohorts: Sequence[CohortSpec], reason: str) -> None:
    """Writes a cohorts.json that holds labelled cohorts and no axis."""
    named = [{"label": c.label, **c.to_json()} for c in cohorts]
    tree = {"format": FORMAT, "version": VERSION, "chosen": {"cohorts": named, "reason": reason}, "axes": []}
    write_atomically(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def read_cohorts(path: str | os.PathLike[str]) -> Cohorts:
    """Reads cohorts.json. Raises CohortError naming the file and what is wrong with it.

    What stands there for people (counts, rates, divergences) is not read and may be anything. A key that nobody
    knows is refused by name: whoever wrote it meant something by it.
    """
    source = str(path)
    tree = read_json(path, CohortError)
    if not isinstance(tree, dict):
        raise CohortError(f"{source}: not a {FORMAT} file: it holds no JSON object")
    found = tree.get("format"), tree.get("version")
    if found != (FORMAT, VERSION) or isinstance(found[1], bool):
        raise CohortError(
            f"{source}: format {_short(found[0])}, version {_short(found[1])}; "
            f"this c2al reads {FORMAT!r}, version {VERSION}"
        )
    _refuse_unknown(tree, ("format", "version", "rows", "positives", "rule", "units", "chosen", "axes"), "", source)
    chosen, axes = tree.get("chosen"), tree.get("axes")
    if not isinstance(chosen, dict) or not _is_name(chosen.get("reason")):
        raise CohortError(f"{source}: 'chosen' is not a section with a 'reason'")
    if not isinstance(axes, list):
        raise CohortError(f"{source}: 'axes' is not a list")
    read = tuple(_axis(a, source) for a in axes)
    for name in sorted({a.name for a in read if [b.name for b in read].count(a.name) > 1}):
        raise CohortError(f"{source}: axis '{name}' is there twice")
    return Cohorts(named=_named(chosen, read, source), reason=chosen["reason"], axes=read)


def _named(tree: dict[str, Any], axes: Sequence[AxisCohorts], source: str) -> tuple[CohortSpec, ...]:
    """The chosen cohorts: {"cohorts": [{"label": ..., "axis": ..., "name": ..., "conditions": ...}, ...]} or
    {"head": ..., "tail": ...}. A cohort of the list may have its label as its name."""
    known = {(a.name, frozenset(c.conditions)): c.name for a in axes for c in a.cohorts}
    named = []
    for label, cohort in _labelled(tree, source):
        spec = CohortSpec.from_json(cohort, source)
        # A label says what the cohort is for. On its axis it has a name of its own.
        name = known.get((spec.axis, frozenset(spec.conditions)), spec.name)
        named.append(dataclasses.replace(spec, name=name, label=label))
    labels = [spec.label for spec in named]
    for label in labels:
        if label in RESERVED_LABELS or not LABEL.fullmatch(label):
            raise CohortError(
                f"{source}: chosen cohort '{terminal(label)}': a name has letters, digits, '_' and '-', and is none of "
                f"{', '.join(RESERVED_LABELS)}"
            )
        if labels.count(label) > 1:
            raise CohortError(f"{source}: two chosen cohorts are named '{label}'")
    return tuple(named)


def _labelled(tree: dict[str, Any], source: str) -> list[tuple[str, Any]]:
    """(label, cohort) of every chosen cohort."""
    _refuse_unknown(
        tree, ("reason", "cohorts") if "cohorts" in tree else ("reason", "head", "tail"), "'chosen'", source
    )
    if "cohorts" not in tree:
        if not {"head", "tail"} <= tree.keys() or (tree["head"] is None) != (tree["tail"] is None):
            raise CohortError(f"{source}: 'chosen' needs 'cohorts', or head and tail both or neither")
        return [(label, tree[label]) for label in PAIR_LABELS if tree[label] is not None]
    cohorts = tree["cohorts"]
    if not isinstance(cohorts, list) or not all(isinstance(c, dict) for c in cohorts):
        raise CohortError(f"{source}: 'chosen.cohorts' is not a list of cohorts")
    labels = [c.get("label", c.get("name")) for c in cohorts]
    if not all(map(_is_name, labels)):
        raise CohortError(f"{source}: a chosen cohort has no name")
    return [(label, {k: v for k, v in c.items() if k != "label"}) for label, c in zip(labels, cohorts, strict=True)]


def _axis(tree: Any, source: str) -> AxisCohorts:
    named = isinstance(tree, dict) and _is_name(tree.get("name"))
    columns, cohorts = (tree.get("columns"), tree.get("cohorts")) if named else (None, None)
    if not isinstance(columns, list) or not all(map(_is_name, columns)) or not isinstance(cohorts, list):
        raise CohortError(f"{source}: an axis needs 'name', 'columns' and 'cohorts', got {_short(tree)}")
    name = tree["name"]
    _refuse_unknown(tree, ("name", "columns", "cuts", "cohorts", "pairs", "pairs_left_out"), f"axis '{name}'", source)
    if not 0 < len(cohorts) <= MOST_COHORTS:
        raise CohortError(f"{source}: axis '{name}' has {len(cohorts) or 'no'} cohorts")
    if not all(isinstance(c, dict) for c in cohorts):
        raise CohortError(f"{source}: axis '{name}' has a cohort that is no section")
    read = tuple(CohortSpec.from_json({**c, "axis": name}, source) for c in cohorts)
    for cohort in read:
        if sorted(c.column for c in cohort.conditions) != sorted(columns):
            raise CohortError(
                f"{source}: axis '{name}', cohort '{cohort.name}': has not one condition on each of {columns}"
            )
    _refuse_overlaps(name, {c for cohort in read for c in cohort.conditions}, source)
    if len({frozenset(c.conditions) for c in read}) < len(read):
        raise CohortError(f"{source}: axis '{name}': two cohorts have the same conditions")
    return AxisCohorts(name=name, columns=tuple(columns), cohorts=read)


def _refuse_overlaps(axis: str, conditions: Iterable[Condition], source: str) -> None:
    """Raises CohortError for two intervals of one column that share values: a row has one cohort of an axis."""
    cut: dict[str, list[tuple[float, float]]] = {}
    for c in conditions:
        if c.equals is None and not c.null:
            bounds = (-math.inf if c.lower is None else c.lower, math.inf if c.upper is None else c.upper)
            cut.setdefault(c.column, []).append(bounds)
    for column, intervals in cut.items():
        for (low, high), (after, _) in itertools.pairwise(sorted(intervals)):
            if after < high:
                raise CohortError(
                    f"{source}: axis '{axis}': two cohorts share values of column '{column}': one is [{low}, {high}), "
                    f"another begins at {after}"
                )


def _refuse_unknown(tree: dict[str, Any], known: Sequence[str], where: str, source: str) -> None:
    for key in tree.keys() - set(known):
        at = f"{terminal(where)}: " if where else ""
        wrong = f"unknown key '{terminal(key)}'{hint(key, known)}; there may be {', '.join(known)}"
        raise CohortError(f"{source}: {at}{wrong}")


def _is_name(value: Any) -> bool:
    problems: list[str] = []
    build(str, value, "", problems)
    return not problems


def _short(value: Any) -> str:
    """A foreign value in a few words."""
    if isinstance(value, dict):
        return f"a section of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    if isinstance(value, int) and value not in INT64:
        return "an integer beyond 64 bits"
    text = terminal(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
