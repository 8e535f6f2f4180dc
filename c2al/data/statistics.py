"""What is learned of the columns from the training split: moments, vocabularies, kinds of ids."""

import base64
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.arrow_types import Category, category, flat
from c2al.data.columns import SparseColumn
from c2al.data.rows import Ints
from c2al.data.schema import check_columns
from c2al.data.source import File, open_dataset
from c2al.data.values import TRANSFORMS, dense_values, leaves
from c2al.errors import DataError
from c2al.state import parse_state, state_text
from c2al.typed import Problems

T = TypeVar("T")
Item = TypeVar("Item")

FORMAT, VERSION = "c2al.statistics", 2

VOCABULARY_SLACK = 1 << 20
"""Distinct counted values that may pile up before they are merged; bounds the pass's memory
beyond the vocabulary itself."""

SAME_TO = 16 * float(np.finfo(np.float64).eps)
"""Values whose spread is below this share of their size are one value. They agree in all but the last
four bits of a float64, and those are what sums and decimal fractions leave behind (0.1 + 0.2 and 0.3).
Their deviation, 1e-16 of the value, would blow up the next true difference to 1e13."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of a dense column, after the transforms before "standardise"."""

    mean: float
    std: float
    """0: the column did not vary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What encoding needs to know of the training split (statistics.json)."""

    moments: dict[str, Moments]
    """Of each dense column that is standardised."""
    vocabularies: dict[str, tuple[int | str, ...]]
    """Embedding table with encoding "vocabulary" -> its values, ascending; the value at position i has
    embedding row i + 1."""
    kinds: dict[str, Category] = dataclasses.field(default_factory=dict)
    """What each sparse column (but for bucketise) held in training: a reader refuses anything else."""
    admitted: dict[str, str] = dataclasses.field(default_factory=dict)
    """Embedding table with encoding "hash" or "identity" and a min_count -> which rows training reached often
    enough, as `packed_rows` writes them: one bit per row, so a hundred million rows take 17 MB at most."""

    def admitted_rows(self, table: str) -> npt.NDArray[np.bool_] | None:
        """(num_embeddings,) whether a row of the table is one of its own; None: no such table."""
        return unpacked_rows(self.admitted[table]) if table in self.admitted else None

    def problems(self) -> Problems:
        for column, moments in self.moments.items():
            if moments.std < 0:
                yield f"moments.{column}.std", f"must not be negative, is {moments.std}"
        for key, values in self.vocabularies.items():
            one_type = len({type(v) for v in values}) <= 1
            if not one_type or list(values) != sorted(set(values)):
                yield f"vocabularies.{key}", "is not an ascending list of integers or of strings"
        for table, packed in self.admitted.items():
            try:
                unpacked_rows(packed)
            except ValueError as e:
                yield f"admitted.{table}", f"is no set of rows: {e}"

    def to_json(self) -> str:
        """Text that `from_json` reads back equal."""
        return state_text(self, format=FORMAT, version=VERSION)

    @staticmethod
    def from_json(text: str | bytes, source: str = "statistics") -> "Statistics":
        """Reads what `to_json` wrote; `source` names it in the DataError anything else raises."""
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return parse_state(content, source, Statistics, format=FORMAT, version=VERSION, error=DataError)


def packed_rows(admitted_R: npt.NDArray[np.bool_]) -> str:
    """A set of rows as text: their number, a colon, and their bits in base64 after zlib."""
    return f"{len(admitted_R)}:{base64.b64encode(zlib.compress(np.packbits(admitted_R).tobytes())).decode()}"


def unpacked_rows(packed: str) -> npt.NDArray[np.bool_]:
    """(R,) what `packed_rows` packed. Raises ValueError."""
    count, _, text = packed.partition(":")
    rows = int(count)
    unpacker = zlib.decompressobj()
    try:
        # No more is unpacked than the rows need, whatever the file claims.
        content = unpacker.decompress(base64.b64decode(text, validate=True), max(1, -(-rows // 8)))
        more = unpacker.decompress(unpacker.unconsumed_tail, 1)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if rows < 1 or len(content) != -(-rows // 8) or more or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"its bits are not those of {rows} rows")
    return np.unpackbits(np.frombuffer(content, np.uint8), count=rows).astype(np.bool_)


class Share(Protocol):
    """Work shared over ranks, as `World.share` does it: `function` of every item, in order, on every rank."""

    def __call__(self, items: Sequence[Item], function: Callable[[Item], T], /) -> list[T]: ...


def alone(items: Sequence[Item], function: Callable[[Item], T], /) -> list[T]:
    """A Share of one process."""
    return [function(item) for item in items]


class Watched(Protocol):
    """The items one by one, as `World.watched` hands them out: it can end a long loop with an error."""

    def __call__(self, items: Iterable[Item], /) -> Iterator[Item]: ...


def fit_statistics(
    paths: Sequence[str], data: DataConfig, share: Share = alone, parts: int = 1, watched: Watched = iter
) -> Statistics:
    """Mean, deviation and vocabularies of the training split, in one streaming pass.

    `share` deals out the row groups in `parts` parts, one per rank, and `watched` hands them out there. The
    result is the same, bit for bit, for any number of parts: moments are taken per row group in float64 and
    merged in the order of the row groups (Chan, Golub and LeVeque 1979), and counts are integers. Neither
    memory nor accuracy depends on the number of rows.

    A vocabulary keeps the num_embeddings - 1 most frequent values that occur at least min_count times; of
    equally frequent ones the smaller. Admission to a hashed table counts rows, in 8 bytes each on every
    rank. A value counts wherever it stands in a list, max_length aside. Raises DataError as reading does.
    """
    files = open_dataset(paths)
    check_columns(files, data)
    sparse = [*_vocabularies(data), *_counted(data)]
    columns = sorted({f.column for f in _standardised(data)} | {f.column for f in sparse})
    groups = [(file, i) for file in files for i, rows in enumerate(file.row_group_rows) if rows and columns]
    scanned = share(range(parts), lambda part: _scan(watched(groups[part::parts]), columns, data))
    spreads: dict[str, Spread] = {}
    for i in range(len(groups)):
        for column, of_group in scanned[i % parts].spreads[i // parts].items():
            spreads[column] = spreads[column].merged(of_group) if column in spreads else of_group
    counts = {f.table_name: _Counts() for f in _vocabularies(data)}
    for part in scanned:
        for key, table in part.counts.items():
            counts[key].add_table(table)
    reached = {f.table_name: sum(part.reached[f.table_name] for part in scanned) for f in _counted(data)}
    return Statistics(
        moments={column: spread.moments(column) for column, spread in sorted(spreads.items())},
        vocabularies={
            f.table_name: counts[f.table_name].top(f.num_embeddings - 1, f.min_count) for f in _vocabularies(data)
        },
        kinds=_kinds(files[0].schema, data),
        admitted={
            f.table_name: packed_rows(np.greater_equal(reached[f.table_name], f.min_count)) for f in _counted(data)
        },
    )


def _kinds(schema: pa.Schema, data: DataConfig) -> dict[str, Category]:
    columns = sorted({f.column for f in data.sparse if f.encoding != "bucketise"})
    found = {column: category(schema.field(column).type) for column in columns}
    return {column: kind for column, kind in found.items() if kind is not None}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Sums over the rows of a dense column that merge without loss of accuracy."""

    rows: int
    mean: float
    m2: float
    """Sum of squared deviations from the mean."""
    low: float
    high: float

    @staticmethod
    def of(x_N: npt.NDArray[np.float64]) -> "Spread":
        with np.errstate(over="ignore"):
            mean = float(x_N.mean())
            m2 = float(np.square(x_N - mean).sum())
        return Spread(len(x_N), mean, m2, float(x_N.min()), float(x_N.max()))

    def merged(self, other: "Spread") -> "Spread":
        """Of the rows of both."""
        rows, delta = self.rows + other.rows, other.mean - self.mean
        return Spread(
            rows,
            self.mean + delta * other.rows / rows,
            self.m2 + other.m2 + delta * delta * self.rows * other.rows / rows,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    def moments(self, column: str) -> Moments:
        """Raises DataError naming the column where its deviation is too large for float64."""
        # The sums cannot tell a constant: the mean of equal values is off by a rounding error, and then
        # every deviation from it is not 0. The extremes can.
        if self.high - self.low <= SAME_TO * max(abs(self.low), abs(self.high)):
            return Moments(self.low, 0.0)
        if not math.isfinite(self.m2):
            raise DataError(
                f"data.train: column '{column}' spans {self.low} to {self.high}, too wide to be standardised"
            )
        return Moments(self.mean, math.sqrt(self.m2 / self.rows))


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """What one part of the row groups holds."""

    spreads: list[dict[str, Spread]]
    """Dense column -> spread, for each row group of the part."""
    counts: dict[str, pa.Table]
    """Table with a vocabulary -> (value, count) over the part."""
    reached: dict[str, Ints]
    """Table with counted rows -> how often the part reaches each row."""


def _scan(groups: Iterable[tuple[File, int]], columns: Sequence[str], data: DataConfig) -> _Scanned:
    """Reads the row groups (file, index), none of them empty."""
    spreads: list[dict[str, Spread]] = []
    counts = {f.table_name: _Counts() for f in _vocabularies(data)}
    reached = {f.table_name: np.zeros(f.num_embeddings, dtype=np.int64) for f in _counted(data)}
    for file, group in groups:
        table = file.read(group, columns)
        of_group = {}
        for feature in _standardised(data):
            x = dense_values(table[feature.column], feature, file.where(group))
            for transform in feature.transforms[: feature.transforms.index("standardise")]:
                x = TRANSFORMS[transform](x)
            of_group[feature.column] = Spread.of(x)
        spreads.append(of_group)
        for sparse in _vocabularies(data):
            counts[sparse.table_name].add(leaves(table[sparse.column], sparse.column, file.where(group)))
        for sparse in _counted(data):
            rows_V = SparseColumn.of(flat(table[sparse.column])).rows_V(sparse, file.where(group))
            reached[sparse.table_name] += np.bincount(rows_V, minlength=sparse.num_embeddings)
    totals = {key: total for key, c in counts.items() if (total := c.total()) is not None}
    return _Scanned(spreads, totals, reached)


def _standardised(data: DataConfig) -> list[DenseFeature]:
    return [f for f in data.dense if "standardise" in f.transforms]


def _vocabularies(data: DataConfig) -> list[SparseFeature]:
    return [f for f in data.sparse if f.encoding == "vocabulary"]


def _counted(data: DataConfig) -> list[SparseFeature]:
    """Features whose table admits the rows that training reaches often enough."""
    return [f for f in data.sparse if f.counts_rows]


class _Counts:
    """How often each value occurred."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, values: pa.Array) -> None:
        counts = values.value_counts()
        self.add_table(pa.table({"value": counts.field("values"), "count": counts.field("counts")}))

    def add_table(self, counted: pa.Table) -> None:
        """Adds the counts of a table of (value, count)."""
        self._tables.append(counted)
        if sum(t.num_rows for t in self._tables[1:]) > max(VOCABULARY_SLACK, self._tables[0].num_rows):
            self._tables = [self._summed()]

    def total(self) -> pa.Table | None:
        """(value, count), each value once; None where nothing was counted."""
        return self._summed() if self._tables else None

    def _summed(self) -> pa.Table:
        total = pa.concat_tables(self._tables).group_by("value").aggregate([("count", "sum")])
        return total.rename_columns({"count_sum": "count"})

    def top(self, size: int, least: int = 0) -> tuple[int | str, ...]:
        """The `size` most frequent values seen `least` times, ascending; of equally frequent ones the smaller."""
        if not self._tables:
            return ()
        total = self._summed().filter(pc.field("count") >= least)
        total = total.sort_by([("count", "descending"), ("value", "ascending")])
        return tuple(sorted(total["value"].slice(0, size).to_pylist()))
