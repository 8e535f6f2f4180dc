"""Score folders of one or more runs, read side by side as blocks for the kernels of `c2al evaluate`.

Letters: N rows, A axes, J runs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from c2al.config import Axis, DataConfig
from c2al.data.arrow_types import decoded, is_text
from c2al.data.cohorts import AxisCohorts, CohortSpec, Condition, read_cohorts
from c2al.data.hashing import hash64
from c2al.data.source import File, open_dataset
from c2al.errors import CohortError, DataError
from c2al.evaluation.bootstrap import logit_bins
from c2al.evaluation.result import COHORT, OVERALL

CLIP = 1e-7
"""Predictions are clipped to [CLIP, 1 - CLIP], in float64, before the logarithm: a float32
sigmoid reaches 0 and 1, and one such row would make NE infinite."""
BLOCK = 1 << 17
"""Most rows of a block; bounds memory when row groups are large."""
MAX_SEGMENTS = 4096
"""Of one categorical axis, where no cohorts.json names them."""

Float = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """One scored run."""

    path: str
    files: tuple[File, ...]
    row_id: str
    """Name of the column, as `user_id`; label, weight and prediction are always called so."""
    user_id: str

    @property
    def rows(self) -> int:
        return sum(sum(f.row_group_rows) for f in self.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """N rows of all J runs."""

    user_N: NDArray[np.uint64]
    """Hash of user_id."""
    segment_NA: NDArray[np.int32]
    """Index into `Segments.names` on each axis, -1 for none."""
    label_N: NDArray[np.uint8]
    weight_N: Float
    loss_NJ: Float
    """Log loss of the clipped prediction."""
    prediction_NJ: Float
    bin_NJ: NDArray[np.int16]
    """Logit bin of the prediction."""

    def sorted_by_user(self) -> "Block":
        order = np.argsort(self.user_N, kind="stable")
        return Block(**{f.name: getattr(self, f.name)[order] for f in dataclasses.fields(self)})


def open_scores(path: str, data: DataConfig) -> Scores:
    """The files of a folder written by `c2al score`, in the order of its rows.

    Raises DataError naming a folder that is not complete, or a column that is missing or of another type.
    """
    scores = Scores(path=path, files=open_dataset([path]), row_id=data.row_id, user_id=data.user_id)
    kinds: dict[str, Callable[[pa.DataType], bool]] = {
        scores.row_id: pa.types.is_integer,
        scores.user_id: lambda kind: pa.types.is_integer(kind) or is_text(decoded(kind)),
        **dict.fromkeys(("label", "weight", "prediction"), pa.types.is_floating),
    }
    for file in scores.files:
        marker = str(PurePosixPath(file.path).parent / "_complete.json")
        if not file.filesystem.get_file_info(marker).is_file:
            raise DataError(f"{path}: incomplete, it has no _complete.json; run `c2al score` again")
        for column, fits in kinds.items():
            if column not in file.schema.names:
                raise DataError(f"{file.name}: column '{column}' is missing; is this a folder of `c2al score`?")
            if not fits(kind := file.schema.field(column).type):
                raise DataError(f"{file.name}: column '{column}' is {kind}, which `c2al score` never writes there")
    return scores


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
    for piece in _row_groups(scores, [axis.column]):
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


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Consecutive rows of one row group of one run."""

    scores: Scores
    where: str
    """The row group, as messages name it."""
    start: int
    """First row in it."""
    table: pa.Table

    def slice(self, start: int, stop: int) -> "_Piece":
        return dataclasses.replace(self, start=self.start + start, table=self.table.slice(start, stop - start))

    def column(self, name: str) -> pa.ChunkedArray:
        """(N,) values. Raises DataError at a null."""
        column = self.table.column(name)
        if column.null_count:
            raise DataError(f"{self.at(np.flatnonzero(column.is_null()))}: {name} is null")
        return column

    def valid(self, name: str, rule: Callable[[Float], NDArray[np.bool_]], text: str) -> Float:
        """(N,) values in float64. Raises DataError at a value that does not fulfil `rule`, called `text`."""
        values: Float = self.column(name).to_numpy().astype(np.float64)
        bad = np.flatnonzero(~rule(values))
        if len(bad):
            row_id = self.column(self.scores.row_id)[bad[0]]
            raise DataError(f"{self.at(bad)}, row_id {row_id}: {name} {text}, is {values[bad[0]]}")
        return values

    def at(self, rows: NDArray[np.int64]) -> str:
        """The first of these rows, as messages name it."""
        return f"{self.where}, row {self.start + int(rows[0])}"


def blocks(runs: Sequence[Scores], segments: Segments) -> Iterator[Block]:
    """The rows of all runs side by side, whatever files and row groups each lies in.

    Users and axes are read from the first run. Raises DataError naming file, row group, row and value
    when a value is outside its contract or two runs do not score the same rows in the same order.
    """
    for other in runs[1:]:
        if other.rows != runs[0].rows:
            raise DataError(
                f"{other.path}: {other.rows} rows, but {runs[0].path} has {runs[0].rows}; they score different data"
            )
    streams = [
        _row_groups(
            run, [run.row_id, "label", "weight", "prediction", *([] if i else [run.user_id, *segments.columns])]
        )
        for i, run in enumerate(runs)
    ]
    for pieces in _aligned(streams):
        first = pieces[0]
        for other_piece in pieces[1:]:
            _check_same_rows(first, other_piece)
        label_N = first.valid("label", lambda y: (y == 0) | (y == 1), "must be 0 or 1")
        weight_N = first.valid("weight", lambda w: (w >= 0) & (w < math.inf), "must be finite and not negative")
        prediction_NJ = np.stack(
            [p.valid("prediction", lambda x: (x >= 0) & (x <= 1), "must lie in [0, 1]") for p in pieces], axis=1
        )
        users = first.column(first.scores.user_id).combine_chunks()
        clipped_NJ = np.clip(prediction_NJ, CLIP, 1 - CLIP)
        log_p_NJ, log_not_p_NJ = np.log(clipped_NJ), np.log1p(-clipped_NJ)
        yield Block(
            user_N=hash64(users),
            segment_NA=segments.of(first.table),
            label_N=label_N.astype(np.uint8),
            weight_N=weight_N,
            loss_NJ=-np.where(label_N[:, None] == 1, log_p_NJ, log_not_p_NJ),
            prediction_NJ=prediction_NJ,
            bin_NJ=logit_bins(log_p_NJ - log_not_p_NJ),
        )


def _row_groups(scores: Scores, columns: Sequence[str]) -> Iterator[_Piece]:
    for file in scores.files:
        for i in range(len(file.row_group_rows)):
            # An axis may lie on a column that is read anyway.
            yield _Piece(scores, file.where(i), 0, file.read(i, list(dict.fromkeys(columns))))


def _aligned(streams: Sequence[Iterator[_Piece]]) -> Iterator[list[_Piece]]:
    """Cuts streams of equally many rows into pieces that hold the same positions of each."""
    heads = [next(stream, None) for stream in streams]
    while all(heads):
        pieces = [head for head in heads if head is not None]
        size = min(BLOCK, *(p.table.num_rows for p in pieces))
        yield [p.slice(0, size) for p in pieces]
        for i, p in enumerate(pieces):
            rows = p.table.num_rows
            heads[i] = p.slice(size, rows) if rows > size else next(streams[i], None)


def _check_same_rows(first: _Piece, other: _Piece) -> None:
    for name in (first.scores.row_id, "label", "weight"):
        a, b = first.column(name).to_numpy(), other.column(name).to_numpy()
        different = np.flatnonzero(a != b)
        if len(different):
            i = different[0]
            raise DataError(
                f"{other.at(different)}: {name} is {b[i]}, but {first.at(different)} "
                f"(row_id {first.column(first.scores.row_id)[i]}) has {a[i]}; "
                "the runs must score the same rows in one order"
            )
