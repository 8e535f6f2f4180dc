"""Arrow columns of a row group -> arrays ready to be batched, with no per-row Python.

Letters: N rows, V single values of a sparse column over the rows.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.arrow_types import canonical, category, flat, numbers
from c2al.data.cohorts import CohortSpec
from c2al.data.columns import SparseColumn, weighted_column
from c2al.data.rows import Floats, Ints, Jagged, Rows, gather
from c2al.data.statistics import Statistics
from c2al.data.values import (
    TRANSFORMS,
    buckets,
    dense_values,
    identifiers,
    labels,
    refuse,
    vocabulary_values,
    weights,
)
from c2al.errors import DataError


class Encoder:
    """Encodes row groups by a DataConfig and the training split's statistics.

    `columns` are what it reads; those in `dictionary` should come dictionary-encoded, so that a string
    is looked up once per distinct value, not once per row.

    With `labelled` = False the rows need no label and no weight, as in serving.

    Raises DataError for statistics of another config, and while encoding for values that are not
    allowed.
    """

    def __init__(
        self,
        data: DataConfig,
        statistics: Statistics,
        cohorts: Sequence[CohortSpec],
        carry: Sequence[str],
        labelled: bool = True,
    ):
        self._data = data
        self._labelled = labelled
        self._moments = statistics.moments
        self._vocabularies = {
            f.table_name: _vocabulary(f, statistics) for f in data.sparse if f.encoding == "vocabulary"
        }
        self._admitted = {f.table_name: _admitted(f, statistics) for f in data.sparse if f.counts_rows}
        for f in data.dense:
            if "standardise" in f.transforms and f.column not in statistics.moments:
                raise DataError(
                    f"statistics: no mean and deviation of dense feature '{f.column}'; fit them with this config"
                )
        self._cohorts = tuple(cohorts)
        self._carry = list(carry)
        targets = {data.label, data.weight} if labelled else set[str]()
        plain = {*targets, *self.carried_columns} - {""}
        self.columns = sorted(plain | {f.column for f in data.dense} | {f.column for f in data.sparse})
        self.columns = sorted({*self.columns, *(f.weights for f in data.sparse if f.weights)})
        self.dictionary = sorted({f.column for f in data.sparse} - plain - {f.weights for f in data.sparse})

    @property
    def carried_columns(self) -> tuple[str, ...]:
        """Columns needed as they are, besides the features: carried or read by a cohort's conditions."""
        conditions = [c for spec in self._cohorts for c in spec.columns]
        return tuple(dict.fromkeys((*self._carry, *conditions)))

    def encode(self, table: pa.Table, where: str) -> Rows:
        """Rows of one row group; `where` names it in the DataError that bad values raise."""
        data, rows = self._data, table.num_rows
        for column in sorted({data.row_id, data.user_id} & set(self._carry)):
            identifiers(table[column], column, where, is_row_id=column == data.row_id)
        dense_NF = np.empty((rows, len(data.dense)), dtype=np.float32)
        for i, feature in enumerate(data.dense):
            dense_NF[:, i] = self._dense(table[feature.column], feature, where)
        member_NC = np.zeros((rows, len(self._cohorts)), dtype=np.float32)
        for i, spec in enumerate(self._cohorts):
            member_NC[:, i] = spec.membership(table)
        return Rows(
            dense_NF,
            *self._features(table, where),
            labels(table[data.label], data.label, where) if self._labelled else np.zeros(rows, np.float32),
            weights(table[data.weight], data.weight, where)
            if data.weight and self._labelled
            else np.ones(rows, np.float32),
            member_NC,
            table.select(self._carry) if self._carry else None,
        )

    def _dense(self, column: pa.ChunkedArray, feature: DenseFeature, where: str) -> Floats:
        """(N,) transformed values."""
        x = dense_values(column, feature, where)
        for transform in feature.transforms:
            if transform == "standardise":
                moments = self._moments[feature.column]
                # A column that did not vary in training says nothing, whatever it holds now.
                x = x - moments.mean if moments.std else np.zeros_like(x)
                x /= moments.std or 1.0
            else:
                x = TRANSFORMS[transform](x)
        with np.errstate(over="ignore"):
            x32 = x.astype(np.float32)
        refuse(~np.isfinite(x32), x, f"'{feature.column}' after its transforms", "too large for float32", where)
        return x32

    def _features(self, table: pa.Table, where: str) -> tuple[tuple[int, ...], Ints, dict[int, Jagged]]:
        """`single`, `single_KN` and `jagged` of Rows."""
        features = self._data.sparse
        columns = {
            c: SparseColumn.of(flat(table[c])) for c in {f.column for f in features if not f.edges and not f.weights}
        }
        single = tuple(
            i
            for i, f in enumerate(features)
            if f.encoding == "bucketise" or (not f.weights and columns[f.column].bounds is None)
        )
        single_KN, jagged = np.empty((len(single), table.num_rows), dtype=np.int64), dict[int, Jagged]()
        row_of = dict(zip(single, single_KN, strict=True))
        for i, f in enumerate(features):
            if i not in row_of:
                jagged[i] = self._weighted(table, f, where) if f.weights else self._sparse(columns[f.column], f, where)
            elif f.encoding == "bucketise":
                row_of[i][:] = buckets(flat(table[f.column]), f, where)
            else:
                row_of[i][:] = self._embedding_rows(columns[f.column], f, where)
        return single, single_KN, jagged

    def _sparse(self, column: SparseColumn, feature: SparseFeature, where: str) -> Jagged:
        """Embedding rows of every row's values, cut to the feature's max_length."""
        values_V = self._embedding_rows(column, feature, where)
        assert column.bounds is not None
        starts_N, stops_N = column.bounds[:-1], column.bounds[1:]
        if not column.is_list:
            return Jagged(values_V, column.bounds)
        stops_N = np.minimum(stops_N, starts_N + feature.max_length)
        if column.valid_N is not None:
            # A null list may still span values.
            stops_N = np.where(column.valid_N, stops_N, starts_N)
        return gather(values_V, starts_N, stops_N)

    def _weighted(self, table: pa.Table, feature: SparseFeature, where: str) -> Jagged:
        """The same of a feature with weights, and the weight of each value."""
        column, weight_V = weighted_column(table[feature.column], table[feature.weights], feature, where)
        assert column.bounds is not None
        starts_N, stops_N = column.bounds[:-1], column.bounds[1:]
        stops_N = np.minimum(stops_N, starts_N + feature.max_length)
        return gather(self._embedding_rows(column, feature, where), starts_N, stops_N, weight_V)

    def _embedding_rows(self, column: SparseColumn, feature: SparseFeature, where: str) -> Ints:
        """(V,) embedding row of each single value."""
        if feature.encoding != "vocabulary":
            rows_V = column.rows_V(feature, where)
            if not feature.counts_rows:
                return rows_V
            # The last row of the table is the one that rare values share.
            return np.where(self._admitted[feature.table_name][rows_V], rows_V, feature.rows - 1)
        ends_N = None if column.bounds is None else column.bounds[1:]
        vocabulary = self._vocabularies[feature.table_name]
        if not pa.types.is_dictionary(column.leaf.type):
            return _look_up(vocabulary_values(column.leaf, feature.column, where, ends_N), vocabulary, feature, where)
        of_entry = _look_up(canonical(column.leaf.dictionary), vocabulary, feature, where)
        return of_entry.take(numbers(column.leaf.indices))


def _vocabulary(feature: SparseFeature, statistics: Statistics) -> pa.Array:
    """The values whose embedding rows are 1, 2, ..."""
    if feature.table_name not in statistics.vocabularies:
        raise DataError(f"statistics: no vocabulary of sparse feature '{feature.key}'; fit them with this config")
    values = statistics.vocabularies[feature.table_name]
    if len(values) > feature.num_embeddings - 1:
        raise DataError(
            f"statistics: the vocabulary of sparse feature '{feature.key}' has {len(values)} values, but its table of "
            f"{feature.num_embeddings} rows holds {feature.num_embeddings - 1}; fit them with this config"
        )
    return pa.array(values)


def _admitted(feature: SparseFeature, statistics: Statistics) -> npt.NDArray[np.bool_]:
    """(num_embeddings,) whether training held the values of each embedding row often enough."""
    admitted = statistics.admitted_rows(feature.table_name)
    if admitted is None or len(admitted) != feature.num_embeddings:
        raise DataError(
            f"statistics: no admitted rows of the table '{feature.table_name}' for {feature.num_embeddings} "
            "embeddings; fit them with this config"
        )
    return admitted


def _look_up(values: pa.Array, vocabulary: pa.Array, feature: SparseFeature, where: str) -> Ints:
    """(V,) embedding rows of int64 or string values; 0 for what the vocabulary does not hold."""
    if not len(vocabulary) or not len(values):
        return np.zeros(len(values), dtype=np.int64)
    if values.type != vocabulary.type:
        raise DataError(
            f"{where}: column '{feature.column}' has type {values.type}, but its values in training were of type "
            f"{category(vocabulary.type)}"
        )
    known: npt.NDArray[np.int32] = pc.index_in(values, value_set=vocabulary).fill_null(-1).to_numpy()
    return known.astype(np.int64) + 1
