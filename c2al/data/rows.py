"""Encoded rows: what the encoder makes of a row group and what a batch is put together from.

Letters: N rows, F dense features, V values of a sparse feature over the rows.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.config import DataConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Jagged:
    """Embedding rows of one sparse feature: row i of N owns values_V[offsets[i]:offsets[i + 1]]."""

    values_V: Ints
    offsets: Ints | None
    """(N + 1,), from 0; None where every row has exactly one value, as most features do."""
    weights_V: Floats | None = None
    """Weight of each value; None where every value weighs 1."""

    def lengths(self) -> npt.NDArray[np.int32]:
        """(N,) values of each row."""
        if self.offsets is None:
            return np.ones(len(self.values_V), dtype=np.int32)
        return np.diff(self.offsets).astype(np.int32)

    def slice(self, start: int, stop: int) -> "Jagged":
        if self.offsets is None:
            return Jagged(self.values_V[start:stop], None)
        offsets = self.offsets[start : stop + 1]
        own = slice(offsets[0], offsets[-1])
        weights_V = None if self.weights_V is None else self.weights_V[own]
        return Jagged(self.values_V[own], offsets - offsets[0], weights_V)

    def take(self, index_N: Ints) -> "Jagged":
        if self.offsets is None:
            return Jagged(self.values_V.take(index_N), None)
        return gather(self.values_V, self.offsets[index_N], self.offsets[index_N + 1], self.weights_V)

    @staticmethod
    def concat(parts: Sequence["Jagged"]) -> "Jagged":
        values_V = np.concatenate([p.values_V for p in parts])
        if all(p.offsets is None for p in parts):
            return Jagged(values_V, None)
        weights = [p.weights_V for p in parts if p.weights_V is not None]
        offsets = offsets_of(np.concatenate([p.lengths() for p in parts]))
        return Jagged(values_V, offsets, np.concatenate(weights) if weights else None)


def gather(values: Ints, starts_N: Ints, stops_N: Ints, weights: Floats | None = None) -> Jagged:
    """Row i becomes values[starts_N[i]:stops_N[i]], and its weights likewise."""
    lengths = stops_N - starts_N
    offsets = offsets_of(lengths)
    index = np.repeat(starts_N - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Jagged(values[index], offsets, None if weights is None else weights[index])


def offsets_of(lengths_N: npt.NDArray[np.integer]) -> Ints:
    """(N + 1,) exclusive cumulative sum."""
    offsets = np.zeros(len(lengths_N) + 1, dtype=np.int64)
    np.cumsum(lengths_N, out=offsets[1:])
    return offsets


@dataclasses.dataclass(frozen=True)
class Rows:
    """N encoded rows, column by column."""

    dense_NF: Floats
    single: tuple[int, ...]
    """Positions in the config of the sparse features with exactly one value in every row, as most have; ascending."""
    single_KN: Ints
    """Their embedding rows. Rows are cut, permuted and joined for all of them at once."""
    jagged: dict[int, Jagged]
    """Position -> the other sparse features."""
    label_N: Floats
    weight_N: Floats
    member_NC: Floats
    carried: pa.Table | None

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def sparse(self) -> tuple[Jagged, ...]:
        """Every sparse feature, in config order."""
        features = {i: Jagged(self.single_KN[k], None) for k, i in enumerate(self.single)} | self.jagged
        return tuple(features[i] for i in sorted(features))

    def slice(self, start: int, stop: int) -> "Rows":
        return Rows(
            self.dense_NF[start:stop],
            self.single,
            self.single_KN[:, start:stop],
            {i: j.slice(start, stop) for i, j in self.jagged.items()},
            self.label_N[start:stop],
            self.weight_N[start:stop],
            self.member_NC[start:stop],
            None if self.carried is None else self.carried.slice(start, stop - start),
        )

    def take(self, index_N: Ints) -> "Rows":
        """The rows at these positions of 0 to N - 1."""
        single_KN = np.empty((len(self.single), len(index_N)), np.int64)
        for out_N, row_N in zip(single_KN, self.single_KN, strict=True):
            # All features at once would be copied first wherever these rows are cut from others; so would
            # the result in mode "raise".
            row_N.take(index_N, out=out_N, mode="clip")
        return Rows(
            self.dense_NF.take(index_N, axis=0),
            self.single,
            single_KN,
            {i: j.take(index_N) for i, j in self.jagged.items()},
            self.label_N.take(index_N),
            self.weight_N.take(index_N),
            self.member_NC.take(index_N, axis=0),
            None if self.carried is None else self.carried.take(pa.array(index_N)),
        )

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """All rows of one or more parts, in order."""
        if len(parts) == 1:
            return parts[0]
        parts = alike(parts)
        tables = [p.carried for p in parts if p.carried is not None]
        return Rows(
            np.concatenate([p.dense_NF for p in parts]),
            parts[0].single,
            np.concatenate([p.single_KN for p in parts], axis=1),
            {i: Jagged.concat([p.jagged[i] for p in parts]) for i in parts[0].jagged},
            np.concatenate([p.label_N for p in parts]),
            np.concatenate([p.weight_N for p in parts]),
            np.concatenate([p.member_NC for p in parts]),
            pa.concat_tables(tables) if tables else None,
        )


def alike(parts: Sequence[Rows]) -> Sequence[Rows]:
    """The parts with the same features in `single`: a column may have one value per row in some row groups only."""
    if all(p.single == parts[0].single for p in parts):
        return parts
    common = set(parts[0].single).intersection(*(p.single for p in parts))
    return [_with_single(p, tuple(sorted(common))) for p in parts]


def _with_single(rows: Rows, single: tuple[int, ...]) -> Rows:
    """The rows with no more features than these in `single`."""
    at = {i: k for k, i in enumerate(rows.single)}
    moved = {i: Jagged(rows.single_KN[k], None) for i, k in at.items() if i not in single}
    return dataclasses.replace(
        rows, single=single, single_KN=rows.single_KN[[at[i] for i in single]], jagged=rows.jagged | moved
    )


Arrays = npt.NDArray[Any]


def model_inputs(parts: Sequence[Rows], data: DataConfig, size: int) -> tuple[Arrays, ...]:
    """All rows of `parts`, padded to B = size, as an exported program takes them.

    dense_BF, then values and lengths of the features whose table has no weights, then, where there are
    any, values, lengths and weights of the others. Both come as in a KeyedJaggedTensor: feature by feature
    in config order. A padding row has zeros and empty bags. Training batches are made of the same arrays.
    """
    own, weighted = own_and_weighted(data)
    dense_BF = padded([p.dense_NF for p in parts], sum(len(p) for p in parts), size)
    return dense_BF, *jagged_inputs(parts, own, size), *(jagged_inputs(parts, weighted, size, True) if weighted else ())


def own_and_weighted(data: DataConfig) -> tuple[list[int], list[int]]:
    """Positions of the sparse features whose table has no weights, and of the others."""
    tables = data.weighted_tables
    weighted = [i for i, f in enumerate(data.sparse) if f.table_name in tables]
    return [i for i in range(len(data.sparse)) if i not in weighted], weighted


def jagged_inputs(
    parts: Sequence[Rows], features: Sequence[int], size: int, weighted: bool = False
) -> tuple[Arrays, ...]:
    """int64 values, int32 lengths (features * B), and if `weighted` float32 weights, of the features there."""
    parts = alike(parts)
    real = sum(len(p) for p in parts)
    row_of = {i: k for k, i in enumerate(parts[0].single)}
    count = sum(real if i in row_of else sum(len(p.jagged[i].values_V) for p in parts) for i in features)
    values, lengths_KB = np.empty(count, np.int64), np.zeros((len(features), size), np.int32)
    weights = np.ones(count if weighted else 0, np.float32)
    at = 0
    # Neighbours that are neighbours in single_KN too are copied together.
    for shift, run in itertools.groupby(enumerate(features), lambda e: row_of[e[1]] - e[0] if e[1] in row_of else None):
        keys, positions = zip(*run, strict=True)
        if shift is not None:
            first, last = row_of[positions[0]], row_of[positions[-1]]
            stop = at + len(keys) * real
            out_KR = values[at:stop].reshape(len(keys), real)
            np.concatenate([p.single_KN[first : last + 1] for p in parts], axis=1, out=out_KR)
            lengths_KB[keys[0] : keys[-1] + 1, :real] = 1
            at = stop
            continue
        for key, feature in zip(keys, positions, strict=True):
            jagged = Jagged.concat([p.jagged[feature] for p in parts])
            stop = at + len(jagged.values_V)
            values[at:stop] = jagged.values_V
            lengths_KB[key, :real] = jagged.lengths()
            if weighted and jagged.weights_V is not None:
                weights[at:stop] = jagged.weights_V
            at = stop
    return values, lengths_KB.reshape(-1), *([weights] if weighted else [])


def padded(parts: Sequence[Floats], real: int, size: int) -> Floats:
    """The arrays one after another, `real` rows in all, with rows of zeros up to `size`."""
    out = np.empty((size, *parts[0].shape[1:]), dtype=np.float32)
    np.concatenate(parts, out=out[:real])
    out[real:] = 0
    return out
