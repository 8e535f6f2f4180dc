"""What the declared columns must be, and what is learned about them from the training split."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.source import File, open_dataset
from c2al.errors import DataError

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


def fit_statistics(paths: Sequence[str], data: DataConfig) -> Statistics:
    """Mean, deviation and vocabularies of the training split, in one streaming pass.

    Moments merge a row group at a time in float64 (Chan, Golub and LeVeque 1979), so neither
    memory nor accuracy depends on the number of rows. A vocabulary keeps the num_embeddings - 1
    most frequent values; of equally frequent ones the smaller. Raises DataError as reading does.
    """
    files = open_dataset(paths)
    dense = [f for f in data.dense if "standardise" in f.transforms]
    vocabularies = [f for f in data.sparse if f.encoding == "vocabulary"]
    columns = sorted({f.column for f in dense} | {f.column for f in vocabularies})
    check_columns(files, data)
    moments = {f.column: (0, 0.0, 0.0) for f in dense}
    counts = {f.key: _Counts() for f in vocabularies}
    for file in files if columns else ():
        for group, rows in enumerate(file.row_group_rows):
            if not rows:
                continue
            table = file.read(group, columns)
            for feature in dense:
                x = dense_values(table[feature.column], feature, file.where(group))
                for transform in feature.transforms[: feature.transforms.index("standardise")]:
                    x = TRANSFORMS[transform](x)
                moments[feature.column] = _merge(moments[feature.column], x)
            for sparse in vocabularies:
                counts[sparse.key].add(leaves(table[sparse.column]))
    return Statistics(
        moments={c: (mean, math.sqrt(m2 / n)) for c, (n, mean, m2) in moments.items()},
        vocabularies={f.key: counts[f.key].top(f.num_embeddings - 1) for f in vocabularies},
    )


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


def _merge(state: tuple[int, float, float], x: npt.NDArray[np.float64]) -> tuple[int, float, float]:
    """(count, mean, sum of squared deviations) of the rows seen and the rows of x."""
    n, mean, m2 = state
    mean_x = float(x.mean())
    delta, total = mean_x - mean, n + len(x)
    m2_x = float(np.square(x - mean_x).sum())
    return total, mean + delta * len(x) / total, m2 + m2_x + delta * delta * n * len(x) / total


class _Counts:
    """How often each value occurred."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []

    def add(self, values: pa.Array) -> None:
        counts = values.value_counts()
        self._tables.append(pa.table({"value": counts.field("values"), "count": counts.field("counts")}))
        if sum(t.num_rows for t in self._tables[1:]) > max(VOCABULARY_SLACK, self._tables[0].num_rows):
            self._tables = [self._total()]

    def _total(self) -> pa.Table:
        total = pa.concat_tables(self._tables).group_by("value").aggregate([("count", "sum")])
        return total.rename_columns({"count_sum": "count"})

    def top(self, size: int) -> tuple[int | str, ...]:
        if not self._tables:
            return ()
        total = self._total().sort_by([("count", "descending"), ("value", "ascending")])
        return tuple(sorted(total["value"].slice(0, size).to_pylist()))
