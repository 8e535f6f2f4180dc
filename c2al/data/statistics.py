"""What is learned of the columns from the training split: moments, vocabularies, kinds of ids."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.arrow_types import Category, category
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
    """Key of a sparse feature with encoding "vocabulary" -> its values, ascending; the value at
    position i has embedding row i + 1."""
    kinds: dict[str, Category] = dataclasses.field(default_factory=dict)
    """What each sparse column (but for bucketise) held in training: a reader refuses anything else."""

    def problems(self) -> Problems:
        for column, moments in self.moments.items():
            if moments.std < 0:
                yield f"moments.{column}.std", f"must not be negative, is {moments.std}"
        for key, values in self.vocabularies.items():
            one_type = len({type(v) for v in values}) <= 1
            if not one_type or list(values) != sorted(set(values)):
                yield f"vocabularies.{key}", "is not an ascending list of integers or of strings"

    def to_json(self) -> str:
        """Text that `from_json` reads back equal."""
        return state_text(self, format=FORMAT, version=VERSION)

    @staticmethod
    def from_json(text: str | bytes, source: str = "statistics") -> "Statistics":
        """Reads what `to_json` wrote; `source` names it in the DataError anything else raises."""
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return parse_state(content, source, Statistics, format=FORMAT, version=VERSION, error=DataError)


class Share(Protocol):
    """Work shared over ranks, as `World.share` does it: `function` of every item, in order, on every rank."""

    def __call__(self, items: Sequence[Item], function: Callable[[Item], T], /) -> list[T]: ...


def alone(items: Sequence[Item], function: Callable[[Item], T], /) -> list[T]:
    """A Share of one process."""
    return [function(item) for item in items]


def fit_statistics(paths: Sequence[str], data: DataConfig, share: Share = alone, parts: int = 1) -> Statistics:
    """Mean, deviation and vocabularies of the training split, in one streaming pass.

    `share` deals out the row groups in `parts` parts, one per rank. The result is the same, bit for
    bit, for any number of parts: moments are taken per row group in float64 and merged in the order of
    the row groups (Chan, Golub and LeVeque 1979), and counts are integers. Neither memory nor accuracy
    depends on the number of rows.

    A vocabulary keeps the num_embeddings - 1 most frequent values; of equally frequent ones the
    smaller. Raises DataError as reading does.
    """
    files = open_dataset(paths)
    check_columns(files, data)
    columns = sorted({f.column for f in _standardised(data)} | {f.column for f in _vocabularies(data)})
    groups = [(file, i) for file in files for i, rows in enumerate(file.row_group_rows) if rows and columns]
    scanned = share(range(parts), lambda part: _scan(groups[part::parts], columns, data))
    spreads: dict[str, Spread] = {}
    for i in range(len(groups)):
        for column, of_group in scanned[i % parts].spreads[i // parts].items():
            spreads[column] = spreads[column].merged(of_group) if column in spreads else of_group
    counts = {f.key: _Counts() for f in _vocabularies(data)}
    for part in scanned:
        for key, table in part.counts.items():
            counts[key].add_table(table)
    return Statistics(
        moments={column: spread.moments(column) for column, spread in sorted(spreads.items())},
        vocabularies={f.key: counts[f.key].top(f.num_embeddings - 1) for f in _vocabularies(data)},
        kinds=_kinds(files[0].schema, data),
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
    """Key of a sparse feature -> (value, count) over the part."""


def _scan(groups: Sequence[tuple[File, int]], columns: Sequence[str], data: DataConfig) -> _Scanned:
    """Reads the row groups (file, index), none of them empty."""
    spreads: list[dict[str, Spread]] = []
    counts = {f.key: _Counts() for f in _vocabularies(data)}
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
            counts[sparse.key].add(leaves(table[sparse.column], sparse.column, file.where(group)))
    return _Scanned(spreads, {key: total for key, c in counts.items() if (total := c.total()) is not None})


def _standardised(data: DataConfig) -> list[DenseFeature]:
    return [f for f in data.dense if "standardise" in f.transforms]


def _vocabularies(data: DataConfig) -> list[SparseFeature]:
    return [f for f in data.sparse if f.encoding == "vocabulary"]


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

    def top(self, size: int) -> tuple[int | str, ...]:
        """The `size` most frequent values, ascending; of equally frequent ones the smaller."""
        if not self._tables:
            return ()
        total = self._summed().sort_by([("count", "descending"), ("value", "ascending")])
        return tuple(sorted(total["value"].slice(0, size).to_pylist()))
