"""What the declared columns must be, and what is learned about them from the training split."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.source import File, open_dataset
from c2al.errors import DataError

T = TypeVar("T")
Item = TypeVar("Item")
Moments = tuple[int, float, float]
"""(rows, mean, sum of squared deviations from the mean)."""

FORMAT = 1
"""Version of the Statistics file."""

VOCABULARY_SLACK = 1 << 20
"""Distinct counted values that may pile up before they are merged; bounds the pass's memory
beyond the vocabulary itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What encoding needs to know of the training split."""

    moments: dict[str, tuple[float, float]]
    """Dense column -> (mean, standard deviation) after the transforms before "standardise"."""
    vocabularies: dict[str, tuple[int | str, ...]]
    """Key of a sparse feature with encoding "vocabulary" -> its values, ascending; the value at
    position i has embedding row i + 1."""

    def to_json(self) -> str:
        """Text that `from_json` reads back equal."""
        tree = {
            "format": FORMAT,
            "moments": {c: {"mean": m, "std": s} for c, (m, s) in sorted(self.moments.items())},
            "vocabularies": {k: list(v) for k, v in sorted(self.vocabularies.items())},
        }
        return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "statistics") -> "Statistics":
        """Reads what `to_json` wrote; `source` names it in the DataError anything else raises."""
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT or set(tree) != {"format", "moments", "vocabularies"}:
                raise ValueError(f"format {tree['format']} with keys {sorted(tree)}, expected format {FORMAT}")
            moments = {c: (float(m["mean"]), float(m["std"])) for c, m in tree["moments"].items()}
            vocabularies = {k: tuple(v) for k, v in tree["vocabularies"].items()}
            for column, (mean, std) in moments.items():
                if not math.isfinite(mean) or not math.isfinite(std) or std < 0:
                    raise ValueError(f"moments of '{column}' are mean {mean}, std {std}")
            for key, values in vocabularies.items():
                if list(values) != sorted(set(values)) or len({type(v) for v in values} - {int, str}):
                    raise ValueError(f"vocabulary '{key}' is not an ascending list of integers or of strings")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{source}: not a statistics file of this version: {type(e).__name__}: {e}") from e
        return Statistics(moments=moments, vocabularies=vocabularies)


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
    moments: dict[str, Moments] = {}
    for i in range(len(groups)):
        for column, of_group in scanned[i % parts].moments[i // parts].items():
            moments[column] = _merge(moments[column], of_group) if column in moments else of_group
    counts = {f.key: _Counts() for f in _vocabularies(data)}
    for part in scanned:
        for key, table in part.counts.items():
            counts[key].add_table(table)
    return Statistics(
        moments={c: (mean, math.sqrt(m2 / n)) for c, (n, mean, m2) in moments.items()},
        vocabularies={f.key: counts[f.key].top(f.num_embeddings - 1) for f in _vocabularies(data)},
    )


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """What one part of the row groups holds."""

    moments: list[dict[str, Moments]]
    """Dense column -> moments, for each row group of the part."""
    counts: dict[str, pa.Table]
    """Key of a sparse feature -> (value, count) over the part."""


def _scan(groups: Sequence[tuple[File, int]], columns: Sequence[str], data: DataConfig) -> _Scanned:
    """Reads the row groups (file, index), none of them empty."""
    moments: list[dict[str, Moments]] = []
    counts = {f.key: _Counts() for f in _vocabularies(data)}
    for file, group in groups:
        table = file.read(group, columns)
        of_group = {}
        for feature in _standardised(data):
            x = dense_values(table[feature.column], feature, file.where(group))
            for transform in feature.transforms[: feature.transforms.index("standardise")]:
                x = TRANSFORMS[transform](x)
            of_group[feature.column] = _moments(x)
        moments.append(of_group)
        for sparse in _vocabularies(data):
            counts[sparse.key].add(leaves(table[sparse.column]))
    return _Scanned(moments, {key: total for key, c in counts.items() if (total := c.total()) is not None})


def _standardised(data: DataConfig) -> list[DenseFeature]:
    return [f for f in data.dense if "standardise" in f.transforms]


def _vocabularies(data: DataConfig) -> list[SparseFeature]:
    return [f for f in data.sparse if f.encoding == "vocabulary"]


def log1p(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sign(x) * log(1 + |x|)."""
    return np.copysign(np.log1p(np.abs(x)), x)


TRANSFORMS = {"log1p": log1p}
"""Transforms that need no statistics."""


def dense_values(column: pa.ChunkedArray, feature: DenseFeature, where: str) -> npt.NDArray[np.float64]:
    """(N,) float64 of a dense column, nulls replaced. Raises DataError at a null without a
    replacement and at NaN or infinity, naming the row of the row group."""
    array = flat(column)
    if array.null_count:
        if feature.null is None:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(
                f"{where}, row {row}: column '{feature.column}' is null and its feature declares no null value"
            )
        array = array.cast(pa.float64()).fill_null(feature.null)
    x: npt.NDArray[np.float64] = array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    finite = np.isfinite(x)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"{where}, row {row}: column '{feature.column}' is {x[row]}, a dense value must be finite")
    return x


def flat(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array, without a copy where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def leaves(column: pa.ChunkedArray) -> pa.Array:
    """Non-null values of a scalar or list column as int64 or string, the types of a vocabulary."""
    array = flat(column)
    if is_list(array.type):
        array = array.flatten()
    return canonical(array.drop_null())


def canonical(array: pa.Array) -> pa.Array:
    """Integers and booleans as int64, strings (dictionary-encoded or not) as string."""
    return array.cast(pa.int64() if _is_integral(array.type) else pa.string())


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type is list-valued."""
    t = pa.types
    return bool(t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind))


def is_string(kind: pa.DataType) -> bool:
    """Whether values of this type are strings, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_integral(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_number(kind: pa.DataType) -> bool:
    return _is_integral(kind) or bool(pa.types.is_floating(kind))


def _is_category(kind: pa.DataType) -> bool:
    return _is_integral(kind) or is_string(kind)


def check_columns(files: Iterable[File], data: DataConfig, carried: Sequence[str] = ()) -> None:
    """Every declared column is in every file with a type that can be encoded, every carried column with one type.

    Raises DataError naming file, column, the type found and the type needed.
    """
    first: dict[str, tuple[str, pa.DataType]] = {}
    for file in files:
        for column, what, accepts in _requirements(data):
            kind = _type_of(file, column)
            if not accepts(kind):
                raise DataError(f"{file.name}: column '{column}' has type {kind}, needed is {what}")
        for column in carried:
            kind = _type_of(file, column)
            name, expected = first.setdefault(column, (file.name, kind))
            if kind != expected:
                raise DataError(f"{file.name}: column '{column}' has type {kind}, but {expected} in {name}")


def _requirements(data: DataConfig) -> Iterable[tuple[str, str, Callable[[pa.DataType], bool]]]:
    yield data.label, "0 or 1 as a number (label)", _is_number
    if data.weight:
        yield data.weight, "a number (weight)", _is_number
    for dense in data.dense:
        yield dense.column, "a number (dense feature)", _is_number
    for sparse in data.sparse:
        yield sparse.column, *_sparse_requirement(sparse)


def _sparse_requirement(feature: SparseFeature) -> tuple[str, Callable[[pa.DataType], bool]]:
    of = f"(sparse feature '{feature.key}', encoding '{feature.encoding}')"
    if feature.encoding == "bucketise":
        return f"a number {of}", _is_number
    leaf, what = (_is_integral, "integer") if feature.encoding == "identity" else (_is_category, "integer or string")
    return f"{what} or a list of them {of}", lambda kind: leaf(kind.value_type if is_list(kind) else kind)


def _type_of(file: File, column: str) -> pa.DataType:
    index = file.schema.get_field_index(column)
    if index < 0:
        close = difflib.get_close_matches(column, file.schema.names, n=1)
        raise DataError(f"{file.name}: no column '{column}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    return file.schema.field(index).type


def _moments(x: npt.NDArray[np.float64]) -> Moments:
    mean = float(x.mean())
    return len(x), mean, float(np.square(x - mean).sum())


def _merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both."""
    (n, mean, m2), (n_b, mean_b, m2_b) = a, b
    delta, total = mean_b - mean, n + n_b
    return total, mean + delta * n_b / total, m2 + m2_b + delta * delta * n * n_b / total


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
