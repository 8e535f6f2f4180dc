"""The segments of an evaluation, and which of them each row belongs to. Letters: N rows, A axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from c2al.config import Axis
from c2al.data.cohort_codes import axis_problem
from c2al.data.cohorts import AxisCohorts, CohortSpec, Condition, read_cohorts
from c2al.errors import CohortError
from c2al.evaluation.result import COHORT, OVERALL
from c2al.evaluation.scores import Scores, row_groups

MAX_SEGMENTS = 4096
"""Of one categorical axis, where no cohorts.json names them."""


class Segments:
    """Which segments there are, and which of them each row belongs to.

    With `cohorts` (a cohorts.json): head and tail if a pair was chosen, and the cohorts of all its
    axes. Without: the values of the categorical `axes` that occur in `scores`, null last.
    Raises CohortError naming an axis column that the scores lack.
    """

    def __init__(self, cohorts: Path | None, axes: Sequence[Axis], scores: Scores):
        self.names = [(OVERALL, OVERALL, "")]
        """(axis, name, detail) of each segment."""
        self._axes: list[AxisCohorts] = []
        if cohorts is None:
            found = [_categories(axis, scores) for axis in axes if axis.kind == "categorical"]
        else:
            read = read_cohorts(cohorts)
            found = list(read.axes)
            for spec in read.named:
                self.names.append((COHORT, spec.label, f"{spec.axis} = {spec.name}"))
                self._axes.append(AxisCohorts(name=spec.axis, columns=spec.columns, cohorts=(spec,)))
        self.names += [(axis.name, cohort.name, "") for axis in found for cohort in axis.cohorts]
        self._axes += found
        self.columns = sorted({column for axis in self._axes for column in axis.columns})
        for axis in self._axes:
            _need(axis.columns, axis.name, scores)

    @property
    def axes(self) -> int:
        """Columns of `of`."""
        return 1 + len(self._axes)

    def of(self, table: pa.Table) -> NDArray[np.int32]:
        """(N, A) index into `names` of each row on each axis, the whole test set first; -1 for none."""
        columns, base = [np.zeros(table.num_rows, dtype=np.int32)], np.int32(1)
        for axis in self._axes:
            codes = axis.codes(table)
            columns.append(np.where(codes >= 0, codes + base, np.int32(-1)))
            base += np.int32(len(axis.cohorts))
        return np.stack(columns, axis=1)


def _need(columns: Sequence[str], axis: str, scores: Scores) -> None:
    for file in scores.files:
        for column in columns:
            if column not in file.schema.names:
                raise CohortError(f"{file.name}: column '{column}' of axis '{axis}' is missing from the scores")


def _categories(axis: Axis, scores: Scores) -> AxisCohorts:
    values: set[Any] = set()
    _need([axis.column], axis.name, scores)
    for file in scores.files:
        if wrong := axis_problem(axis.kind, file.schema.field(axis.column).type):
            raise CohortError(f"{file.name}: axis '{axis.name}': column '{axis.column}' {wrong}")
    for piece in row_groups(scores, [axis.column]):
        values.update(pc.unique(piece.table.column(axis.column)).to_pylist())
        if len(values) > MAX_SEGMENTS:
            raise CohortError(f"axis '{axis.name}': column '{axis.column}' has more than {MAX_SEGMENTS} values")
    conditions = [Condition(column=axis.column, equals=v) for v in sorted(values - {None})]
    if None in values:
        conditions.append(Condition(column=axis.column, null=True))
    cohorts = (
        CohortSpec(axis=axis.name, name="null" if c.null else str(c.equals), conditions=(c,)) for c in conditions
    )
    return AxisCohorts(name=axis.name, columns=(axis.column,), cohorts=tuple(cohorts))
