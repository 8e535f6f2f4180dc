"""Sparse columns of a row group taken apart into single values, and the embedding rows that need no vocabulary.

Letters: N rows, V single values of a sparse column over the rows.
"""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import SparseFeature
from c2al.data.arrow_types import flat, float64, is_list, is_text, numbers
from c2al.data.hashing import hash64, hashed_rows
from c2al.data.rows import Floats, Ints, offsets_of
from c2al.data.values import row_of
from c2al.errors import DataError


@dataclasses.dataclass(frozen=True)
class SparseColumn:
    """A sparse column taken apart; features that share it share this, and its hash."""

    leaf: pa.Array
    """(V,) the single values, without nulls."""
    bounds: Ints | None
    """(N + 1,) row i owns values [bounds[i], bounds[i + 1]); None where every row has exactly one."""
    is_list: bool
    valid_N: npt.NDArray[np.bool_] | None
    """False where a whole list is null; None: nowhere."""

    @staticmethod
    def of(array: pa.Array) -> "SparseColumn":
        if not is_list(array.type):
            leaf = by_distinct(array.drop_null() if array.null_count else array)
            bounds = offsets_of(array.is_valid().to_numpy(zero_copy_only=False)) if array.null_count else None
            return SparseColumn(leaf, bounds, False, None)
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        # Offsets of a sliced list count from the start of its parent, which is what `values` holds.
        bounds = array.offsets.to_numpy().astype(np.int64, copy=False)
        leaf = array.values.slice(bounds[0], bounds[-1] - bounds[0])
        bounds = bounds - bounds[0]
        if leaf.null_count:
            bounds = offsets_of(leaf.is_valid().to_numpy(zero_copy_only=False))[bounds]
            leaf = leaf.drop_null()
        valid_N = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
        return SparseColumn(by_distinct(leaf), bounds, True, valid_N)

    @functools.cached_property
    def distinct_hash(self) -> npt.NDArray[np.uint64]:
        """Hash of each distinct string."""
        return hash64(self.leaf.dictionary)

    def rows_V(self, feature: SparseFeature, where: str) -> Ints:
        """(V,) embedding row of each single value with encoding "hash" or "identity", before admission."""
        if feature.encoding == "hash":
            if not pa.types.is_dictionary(self.leaf.type):
                return hashed_rows(self.leaf, feature.num_embeddings)
            of_entry = (self.distinct_hash % np.uint64(feature.num_embeddings)).view(np.int64)
            return of_entry.take(numbers(self.leaf.indices))
        return identity_rows(self.leaf, feature, where, None if self.bounds is None else self.bounds[1:])


def by_distinct(leaf: pa.Array) -> pa.Array:
    """Strings dictionary-encoded: each distinct one is looked at once."""
    return leaf.dictionary_encode() if is_text(leaf.type) else leaf


def identity_rows(leaf: pa.Array, feature: SparseFeature, where: str, ends_N: Ints | None) -> Ints:
    """(V,) the integers themselves."""
    values: npt.NDArray[np.integer] = numbers(leaf)
    bad = (values < 0) | (values >= feature.num_embeddings)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{where}, row {row_of(at, ends_N)}: column '{feature.column}' is {values[at]}, outside "
            f"[0, {feature.num_embeddings}) of encoding 'identity'"
        )
    return values.astype(np.int64)


def weighted_column(
    values: pa.ChunkedArray, weights: pa.ChunkedArray, feature: SparseFeature, where: str
) -> tuple[SparseColumn, Floats]:
    """A list column and the weight of each of its values (V,).

    A null value is dropped with its weight, and a null list is an empty one. Raises DataError naming the
    row where the two lists differ in length, or where a weight is null or not finite.
    """
    array, weight = flat(values), flat(weights)
    length_N, weights_N = _lengths(array), _lengths(weight)
    differs = np.flatnonzero(length_N != weights_N)
    if len(differs):
        at = int(differs[0])
        raise DataError(
            f"{where}, row {at}: column '{feature.column}' has {length_N[at]} values, but '{feature.weights}' "
            f"{weights_N[at]} weights"
        )
    leaf, leaf_weight = array.flatten(), weight.flatten()
    with np.errstate(over="ignore"):
        weight_V = float64(leaf_weight).astype(np.float32)
    known_V = leaf.is_valid().to_numpy(zero_copy_only=False)
    bad = np.flatnonzero((~np.isfinite(weight_V) | leaf_weight.is_null().to_numpy(zero_copy_only=False)) & known_V)
    ends_N = np.cumsum(length_N)
    if len(bad):
        at = int(bad[0])
        raise DataError(
            f"{where}, row {row_of(at, ends_N)}: column '{feature.weights}' holds {leaf_weight[at].as_py()}, "
            "a weight must be a finite number"
        )
    bounds = offsets_of(length_N)
    if not known_V.all():
        bounds, leaf, weight_V = offsets_of(known_V)[bounds], leaf.drop_null(), weight_V[known_V]
    return SparseColumn(by_distinct(leaf), bounds, True, None), weight_V


def _lengths(array: pa.Array) -> Ints:
    """(N,) values of each list; 0 for a null one."""
    lengths: Ints = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths
