"""Arrow columns of a row group -> arrays ready to be batched, with no per-row Python.

Letters: N rows, F dense features, V values of a sparse feature over the rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import DataConfig, SparseFeature
from c2al.data.schema import TRANSFORMS, Statistics, canonical, dense_values, flat, is_list, is_string
from c2al.errors import DataError

if TYPE_CHECKING:
    from c2al.data.cohorts import CohortSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Jagged:
    """Embedding rows of one sparse feature: row i of N owns values_V[offsets[i]:offsets[i + 1]]."""

    values_V: Ints
    offsets: Ints | None
    """(N + 1,), from 0; None where every row has exactly one value, as most features do."""

    def lengths(self) -> npt.NDArray[np.int32]:
        """(N,) values of each row."""
        if self.offsets is None:
            return np.ones(len(self.values_V), dtype=np.int32)
        return np.diff(self.offsets).astype(np.int32)

    def slice(self, start: int, stop: int) -> "Jagged":
        if self.offsets is None:
            return Jagged(self.values_V[start:stop], None)
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values_V[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, index_N: Ints) -> "Jagged":
        if self.offsets is None:
            return Jagged(self.values_V[index_N], None)
        return gather(self.values_V, self.offsets[index_N], self.offsets[index_N + 1])

    @staticmethod
    def concat(parts: Sequence["Jagged"]) -> "Jagged":
        values_V = np.concatenate([p.values_V for p in parts])
        if all(p.offsets is None for p in parts):
            return Jagged(values_V, None)
        return Jagged(values_V, offsets_of(np.concatenate([p.lengths() for p in parts])))


def gather(values: Ints, starts_N: Ints, stops_N: Ints) -> Jagged:
    """Row i becomes values[starts_N[i]:stops_N[i]]."""
    lengths = stops_N - starts_N
    offsets = offsets_of(lengths)
    return Jagged(values[np.repeat(starts_N - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


def offsets_of(lengths_N: npt.NDArray[np.integer]) -> Ints:
    """(N + 1,) exclusive cumulative sum."""
    offsets = np.zeros(len(lengths_N) + 1, dtype=np.int64)
    np.cumsum(lengths_N, out=offsets[1:])
    return offsets


@dataclasses.dataclass(frozen=True)
class Rows:
    """N encoded rows, column by column."""

    dense_NF: Floats
    sparse: tuple[Jagged, ...]
    """One per sparse feature, in config order."""
    label_N: Floats
    weight_N: Floats
    member_NC: Floats
    carried: pa.Table | None

    def __len__(self) -> int:
        return len(self.label_N)

    def slice(self, start: int, stop: int) -> "Rows":
        return Rows(
            self.dense_NF[start:stop],
            tuple(j.slice(start, stop) for j in self.sparse),
            self.label_N[start:stop],
            self.weight_N[start:stop],
            self.member_NC[start:stop],
            None if self.carried is None else self.carried.slice(start, stop - start),
        )

    def take(self, index_N: Ints) -> "Rows":
        return Rows(
            self.dense_NF[index_N],
            tuple(j.take(index_N) for j in self.sparse),
            self.label_N[index_N],
            self.weight_N[index_N],
            self.member_NC[index_N],
            None if self.carried is None else self.carried.take(pa.array(index_N)),
        )

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """All rows of one or more parts, in order."""
        if len(parts) == 1:
            return parts[0]
        tables = [p.carried for p in parts if p.carried is not None]
        return Rows(
            np.concatenate([p.dense_NF for p in parts]),
            tuple(Jagged.concat(js) for js in zip(*(p.sparse for p in parts), strict=True)),
            np.concatenate([p.label_N for p in parts]),
            np.concatenate([p.weight_N for p in parts]),
            np.concatenate([p.member_NC for p in parts]),
            pa.concat_tables(tables) if tables else None,
        )


class Encoder:
    """Encodes row groups by a DataConfig and the training split's statistics.

    `columns` are what it reads; those in `dictionary` should come dictionary-encoded, so that a
    string is hashed once a distinct value, not once a row.
    """

    def __init__(
        self,
        data: DataConfig,
        statistics: Statistics,
        cohorts: "Sequence[CohortSpec] | None",
        carry: Sequence[str],
    ):
        self._data = data
        self._moments = {
            f.column: statistics.moments.get(f.column) for f in data.dense if "standardise" in f.transforms
        }
        for column, moments in self._moments.items():
            if moments is None:
                raise DataError(
                    f"statistics: no mean and deviation of dense feature '{column}'; fit them with this config"
                )
        self._vocabularies: dict[str, pa.Array] = {}
        for f in data.sparse:
            if f.encoding == "vocabulary":
                if f.key not in statistics.vocabularies:
                    raise DataError(f"statistics: no vocabulary of sparse feature '{f.key}'; fit them with this config")
                self._vocabularies[f.key] = pa.array(statistics.vocabularies[f.key])
        self._cohorts = tuple(cohorts or ())
        self._carry = list(carry)
        plain = {data.label, data.weight, *self.carried_columns} - {""}
        self.columns = sorted(plain | {f.column for f in data.dense} | {f.column for f in data.sparse})
        self.dictionary = sorted({f.column for f in data.sparse} - plain)

    @property
    def carried_columns(self) -> tuple[str, ...]:
        """Columns needed as they are, besides the features: carried or read by a cohort's conditions."""
        conditions = [c for spec in self._cohorts for c in spec.columns]
        return tuple(dict.fromkeys((*self._carry, *conditions)))

    def encode(self, table: pa.Table, where: str) -> Rows:
        """Rows of one row group; `where` names it in the DataError that bad values raise."""
        rows = table.num_rows
        dense_NF = np.empty((rows, len(self._data.dense)), dtype=np.float32)
        for i, feature in enumerate(self._data.dense):
            x = dense_values(table[feature.column], feature, where)
            for transform in feature.transforms:
                if transform == "standardise":
                    mean, std = self._moments[feature.column] or (0.0, 1.0)
                    # A column that never varied says nothing: it enters as 0, not as 0 / 0.
                    x = (x - mean) / (std or 1.0)
                else:
                    x = TRANSFORMS[transform](x)
            with np.errstate(over="ignore"):
                dense_NF[:, i] = x
            _refuse(
                ~np.isfinite(dense_NF[:, i]),
                x,
                f"'{feature.column}' after its transforms",
                "too large for float32",
                where,
            )
        member_NC = np.zeros((rows, len(self._cohorts)), dtype=np.float32)
        for i, spec in enumerate(self._cohorts):
            member_NC[:, i] = spec.membership(table)
        return Rows(
            dense_NF,
            tuple(self._sparse(flat(table[f.column]), f, where) for f in self._data.sparse),
            _label(table[self._data.label], self._data.label, where),
            _weight(table[self._data.weight], self._data.weight, where)
            if self._data.weight
            else np.ones(rows, np.float32),
            member_NC,
            table.select(self._carry) if self._carry else None,
        )

    def _sparse(self, array: pa.Array, feature: SparseFeature, where: str) -> Jagged:
        if feature.encoding == "bucketise":
            return Jagged(_buckets(array, feature, where), None)
        if not is_list(array.type):
            if not array.null_count:
                return Jagged(self._ids(array, feature, where, None), None)
            valid = array.is_valid().to_numpy(zero_copy_only=False)
            offsets = offsets_of(valid)
            return Jagged(self._ids(array.drop_null(), feature, where, offsets[1:]), offsets)
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        # Offsets of a sliced list count from the start of its parent, which is what `values` holds.
        bounds = array.offsets.to_numpy().astype(np.int64, copy=False)
        first = bounds[0]
        child = array.values.slice(first, bounds[-1] - first)
        bounds = bounds - first
        if child.null_count:
            bounds = offsets_of(child.is_valid().to_numpy(zero_copy_only=False))[bounds]
            child = child.drop_null()
        starts, stops = bounds[:-1], np.minimum(bounds[1:], bounds[:-1] + feature.max_length)
        if array.null_count:
            # A null list may still span values.
            stops = np.where(array.is_valid().to_numpy(zero_copy_only=False), stops, starts)
        return gather(self._ids(child, feature, where, bounds[1:]), starts, stops)

    def _ids(self, leaf: pa.Array, feature: SparseFeature, where: str, ends: Ints | None) -> Ints:
        """(V,) embedding rows of non-null values; value v belongs to row #(ends <= v), or v."""
        if is_string(leaf.type):
            if not pa.types.is_dictionary(leaf.type):
                leaf = leaf.dictionary_encode()
            distinct = canonical(leaf.dictionary)
            codes = leaf.indices.to_numpy()
            ids: Ints = self._known(distinct, feature)[codes]
            return ids
        if feature.encoding != "identity":
            return self._known(leaf, feature)
        values: npt.NDArray[np.integer] = leaf.to_numpy(zero_copy_only=False)
        bad = (values < 0) | (values >= feature.num_embeddings)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            row = at if ends is None else int(np.searchsorted(ends, at, side="right"))
            raise DataError(
                f"{where}, row {row}: column '{feature.column}' is {values[at]}, outside "
                f"[0, {feature.num_embeddings}) of encoding 'identity'"
            )
        return values.astype(np.int64)

    def _known(self, values: pa.Array, feature: SparseFeature) -> Ints:
        """(V,) embedding rows by hash or vocabulary."""
        if feature.encoding == "vocabulary":
            vocabulary = self._vocabularies[feature.key]
            values = canonical(values)
            if values.type != vocabulary.type:
                # An empty vocabulary, or strings where the training split had integers: all unknown.
                return np.zeros(len(values), dtype=np.int64)
            known: npt.NDArray[np.int32] = pc.index_in(values, value_set=vocabulary).fill_null(-1).to_numpy()
            return known.astype(np.int64) + 1
        return (hash64(values) % np.uint64(feature.num_embeddings)).view(np.int64)


def hash64(values: pa.Array) -> npt.NDArray[np.uint64]:
    """(V,) 64-bit hash that no version, platform or process changes.

    Integers: the finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection. Strings:
    SipHash-2-4 of the UTF-8 bytes under pandas' fixed default key, through the same finaliser.
    """
    if is_string(values.type):
        hashes: npt.NDArray[np.uint64] = pd.util.hash_array(np.asarray(values, dtype=object), categorize=False)
        return hashes
    if not pa.types.is_uint64(values.type):
        values = values.cast(pa.int64())
    z: npt.NDArray[np.uint64] = values.to_numpy(zero_copy_only=False).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _buckets(array: pa.Array, feature: SparseFeature, where: str) -> Ints:
    x: npt.NDArray[np.float64] = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    nan = np.isnan(x)
    if nan.sum() > array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        row = int(np.flatnonzero(nan & valid)[0])
        raise DataError(f"{where}, row {row}: column '{feature.column}' is nan, which lies in no bucket")
    bucket = np.searchsorted(np.asarray(feature.edges), x, side="right") + 1
    bucket[nan] = 0
    return bucket.astype(np.int64, copy=False)


def _label(column: pa.ChunkedArray, name: str, where: str) -> Floats:
    label = _numbers(column, name, where)
    _refuse((label != 0) & (label != 1), label, f"'{name}'", "a label must be 0 or 1", where)
    return label.astype(np.float32)


def _weight(column: pa.ChunkedArray, name: str, where: str) -> Floats:
    weight = _numbers(column, name, where).astype(np.float32)
    # Not zero either: zero marks padding.
    _refuse(~((weight > 0) & np.isfinite(weight)), weight, f"'{name}'", "a weight must be positive and finite", where)
    return weight


def _numbers(column: pa.ChunkedArray, name: str, where: str) -> npt.NDArray[np.generic]:
    array = flat(column)
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {row}: column '{name}' is null")
    numbers: npt.NDArray[np.generic] = array.to_numpy(zero_copy_only=False)
    return numbers


def _refuse(bad: npt.NDArray[np.bool_], values: npt.NDArray[np.generic], name: str, rule: str, where: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(f"{where}, row {row}: column {name} is {values[row]}, {rule}")
