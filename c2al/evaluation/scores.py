"""Score folders of one or more runs, read side by side as blocks for the kernels of `c2al evaluate`.

Letters: N rows, A axes, J runs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from c2al.bins import logit_bins
from c2al.config import DataConfig
from c2al.data.arrow_types import decoded, is_text, plain
from c2al.data.hashing import hash64
from c2al.data.scores_folder import check_marker, open_scored
from c2al.data.source import File
from c2al.errors import DataError
from c2al.ne import PROBABILITY_CLIP

BLOCK = 1 << 17
"""Most rows of a block; bounds memory when row groups are large."""
UNIQUE_ROWS = 1 << 25
"""Row ids that are sorted at a time in the search for duplicates."""

Float = NDArray[np.float64]
Segmenter = Callable[[pa.Table], NDArray[np.int32]]
"""(N, A) index of each row's segment on each axis, -1 for none."""


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
    item_N: NDArray[np.uint64]
    """Hash of the item; all 0 where no item column was asked for."""
    segment_NA: NDArray[np.int32]
    """Index of the row's segment on each axis, -1 for none."""
    label_N: NDArray[np.uint8]
    weight_N: Float
    loss_NJ: Float
    """Log loss of the clipped prediction."""
    prediction_NJ: Float
    bin_NJ: NDArray[np.int16]
    """Logit bin of the prediction."""

    def sorted_by_user(self) -> "Block":
        return self.take(np.argsort(self.user_N, kind="stable"))

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Block":
        return Block(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})


def open_scores(path: str, data: DataConfig) -> Scores:
    """The files of a folder written by `c2al score` or by hand, in the order of its rows.

    Raises DataError naming a folder that is not complete, a part that its marker lists otherwise, or a
    column that is missing, there twice or of another type.
    """
    scores = Scores(path=path, files=open_scored([path]), row_id=data.row_id, user_id=data.user_id)
    for folder, file in {str(PurePosixPath(f.path).parent): f for f in scores.files}.items():
        check_marker(folder, file.filesystem)
    integer = ("an integer", pa.types.is_integer)
    number = ("a number", lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind))
    kinds: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        scores.row_id: integer,
        scores.user_id: ("an integer or a string", _is_id),
        **dict.fromkeys(("label", "weight", "prediction"), number),
    }
    for file in scores.files:
        for column, (wanted, fits) in kinds.items():
            kind = column_type(file, column)
            if not fits(kind):
                raise DataError(f"{file.name}: column '{column}' is {kind}; evaluate needs {wanted} there")
    _one_kind(scores, scores.user_id)
    return scores


def column_type(file: File, column: str) -> pa.DataType:
    """Raises DataError when the column is missing or there twice."""
    found = file.schema.get_all_field_indices(column)
    if not found:
        raise DataError(f"{file.name}: column '{column}' is missing; is this a folder of `c2al score`?")
    if len(found) > 1:
        raise DataError(f"{file.name}: column '{column}' is there {len(found)} times")
    return file.schema.field(found[0]).type


def check_items(scores: Scores, column: str) -> None:
    """Raises DataError when the scores do not carry a column of item ids."""
    for file in scores.files:
        if column not in file.schema.names:
            raise DataError(
                f"{file.name}: column '{column}' is missing (evaluate.items); `c2al score` carries it where the "
                "configuration that it scores with names it"
            )
        if not _is_id(kind := column_type(file, column)):
            raise DataError(f"{file.name}: column '{column}' is {kind}; evaluate.items needs an integer or a string")
    _one_kind(scores, column)


def _one_kind(scores: Scores, column: str) -> None:
    """Ids that are integers in one file and strings in another would be other ids."""
    first = scores.files[0]
    for file in scores.files[1:]:
        if _is_text(file.schema.field(column).type) != _is_text(first.schema.field(column).type):
            raise DataError(
                f"{file.name}: column '{column}' is {file.schema.field(column).type}, "
                f"but in {first.name} it is {first.schema.field(column).type}"
            )


def _is_text(kind: pa.DataType) -> bool:
    return is_text(decoded(kind))


def _is_id(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind)) or _is_text(kind)


def check_unique(scores: Scores) -> None:
    """Raises DataError naming both rows when two rows of a run have the same row id.

    Memory: UNIQUE_ROWS ids, about; more rows are looked at in several passes.
    """
    shares = -(-scores.rows // UNIQUE_ROWS)
    for share in range(shares):
        parts = []
        for piece in row_groups(scores, [scores.row_id]):
            id_N = piece.integers(scores.row_id)
            parts.append(id_N if shares == 1 else id_N[id_N % np.uint64(shares) == share])
        id_N = np.sort(np.concatenate(parts))
        twice = np.flatnonzero(id_N[1:] == id_N[:-1])
        if len(twice):
            _refuse_duplicate(scores, id_N[twice[0]])


def _refuse_duplicate(scores: Scores, wanted: np.uint64) -> None:
    places = []
    for piece in row_groups(scores, [scores.row_id]):
        for row in np.flatnonzero(piece.integers(scores.row_id) == wanted):
            places.append((piece.at(np.array([row])), piece.column(scores.row_id)[int(row)]))
            if len(places) == 2:
                (first, value), (second, _) = places
                raise DataError(
                    f"{second}: {scores.row_id} {value} is there already, at {first}; a row must be scored once"
                )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of one row group of one run."""

    scores: Scores
    where: str
    """The row group, as messages name it."""
    start: int
    """First row in it."""
    table: pa.Table

    def slice(self, start: int, stop: int) -> "Piece":
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

    def integers(self, name: str) -> NDArray[np.uint64]:
        """(N,) the 64 bits of integer values. Raises DataError at a null."""
        column = self.column(name)
        wide = column if pa.types.is_uint64(column.type) else column.cast(pa.int64())
        return np.asarray(wide.to_numpy()).view(np.uint64)

    def ids(self, name: str) -> NDArray[np.uint64]:
        """(N,) hash of integer or string values. Raises DataError at a null."""
        return hash64(self.column(name).combine_chunks())

    def at(self, rows: NDArray[np.int64]) -> str:
        """The first of these rows, as messages name it."""
        return f"{self.where}, row {self.start + int(rows[0])}"


def blocks(runs: Sequence[Scores], columns: Sequence[str], segment: Segmenter, items: str = "") -> Iterator[Block]:
    """The rows of all runs side by side, whatever files and row groups each lies in.

    columns: those that `segment` needs. Users, items and axes are read from the first run. Raises DataError
    naming file, row group, row and value when a value is outside its contract or two runs do not score the
    same rows in the same order.
    """
    for other in runs[1:]:
        if other.rows != runs[0].rows:
            raise DataError(
                f"{other.path}: {other.rows} rows, but {runs[0].path} has {runs[0].rows}; they score different data"
            )
    more = [runs[0].user_id, *([items] if items else []), *columns]
    streams = [
        row_groups(run, [run.row_id, "label", "weight", "prediction", *([] if i else more)])
        for i, run in enumerate(runs)
    ]
    for pieces in _aligned(streams):
        for other_piece in pieces[1:]:
            _check_same_rows(pieces[0], other_piece)
        yield _block(pieces, segment, items)


def _block(pieces: Sequence[Piece], segment: Segmenter, items: str) -> Block:
    first = pieces[0]
    label_N = first.valid("label", lambda y: (y == 0) | (y == 1), "must be 0 or 1")
    weight_N = first.valid("weight", lambda w: (w >= 0) & (w < math.inf), "must be finite and not negative")
    prediction_NJ = np.stack(
        [p.valid("prediction", lambda x: (x >= 0) & (x <= 1), "must lie in [0, 1]") for p in pieces], axis=1
    )
    clipped_NJ = np.clip(prediction_NJ, PROBABILITY_CLIP, 1 - PROBABILITY_CLIP)
    log_p_NJ, log_not_p_NJ = np.log(clipped_NJ), np.log1p(-clipped_NJ)
    return Block(
        user_N=first.ids(first.scores.user_id),
        item_N=first.ids(items) if items else np.zeros(len(label_N), np.uint64),
        segment_NA=segment(first.table),
        label_N=label_N.astype(np.uint8),
        weight_N=weight_N,
        loss_NJ=-np.where(label_N[:, None] == 1, log_p_NJ, log_not_p_NJ),
        prediction_NJ=prediction_NJ,
        bin_NJ=logit_bins(log_p_NJ - log_not_p_NJ),
    )


def row_groups(scores: Scores, columns: Sequence[str]) -> Iterator[Piece]:
    """Each row group's `columns`, once each, strings without dictionaries. Raises what File.read raises."""
    names = list(dict.fromkeys(columns))
    for file in scores.files:
        for i in range(len(file.row_group_rows)):
            table = file.read(i, names)
            for k, name in enumerate(names):
                if _is_text(table.schema.field(name).type):
                    table = table.set_column(k, name, plain(table.column(name)))
            yield Piece(scores, file.where(i), 0, table)


def _aligned(streams: Sequence[Iterator[Piece]]) -> Iterator[list[Piece]]:
    """Cuts streams of equally many rows into pieces that hold the same positions of each."""
    heads = [next(stream, None) for stream in streams]
    while all(heads):
        pieces = [head for head in heads if head is not None]
        size = min(BLOCK, *(p.table.num_rows for p in pieces))
        yield [p.slice(0, size) for p in pieces]
        for i, p in enumerate(pieces):
            rows = p.table.num_rows
            heads[i] = p.slice(size, rows) if rows > size else next(streams[i], None)


def _check_same_rows(first: Piece, other: Piece) -> None:
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
