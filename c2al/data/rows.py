"""Encoded rows: what the encoder makes of a row group and what a batch is put together from.

Letters: N rows, F dense features, V values of a sparse feature over the rows.
"""

import dataclasses
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
            return Jagged(self.values_V[index_N], None)
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
    weighted = [i for i, f in enumerate(data.sparse) if f.table_name in data.weighted_tables]
    return [i for i in range(len(data.sparse)) if i not in weighted], weighted


def jagged_inputs(
    parts: Sequence[Rows], features: Sequence[int], size: int, weighted: bool = False
) -> tuple[Arrays, ...]:
    """int64 values, int32 lengths (features * B), and if `weighted` float32 weights, of the features there."""
    lengths_KB = np.zeros((len(features), size), dtype=np.int32)
    values, weights = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    for key, feature in enumerate(features):
        at = 0
        for part in parts:
            jagged = part.sparse[feature]
            lengths_KB[key, at : at + len(part)] = 1 if jagged.offsets is None else np.diff(jagged.offsets)
            values.append(jagged.values_V)
            if weighted:
                # Ones that take no memory of their own.
                ones_V = np.broadcast_to(np.float32(1), len(jagged.values_V))
                weights.append(ones_V if jagged.weights_V is None else jagged.weights_V)
            at += len(part)
    return np.concatenate(values), lengths_KB.reshape(-1), *([np.concatenate(weights)] if weighted else [])


def padded(parts: Sequence[Floats], real: int, size: int) -> Floats:
    """The arrays one after another, `real` rows in all, with rows of zeros up to `size`."""
    out = np.zeros((size, *parts[0].shape[1:]), dtype=np.float32)
    np.concatenate(parts, out=out[:real])
    return out
