"""Impressions for any data configuration, as Parquet for c2al and as tensors for the stacks beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from stack import Columns, MergedTable

from c2al.config import DataConfig
from c2al.data.hashing import hash64

ROW_GROUP = 65_536
WORDS = 40
"""Distinct values of a vocabulary column."""


def table(data: DataConfig, rows: int, seed: int = 0) -> pa.Table:
    """A column of every name that `data` names; ids occur with a skew, lists have 1 to max_length values."""
    rng = np.random.default_rng(seed)
    columns: dict[str, pa.Array] = {
        data.label: pa.array((rng.random(rows) < 0.3).astype(np.int8)),
        data.row_id: pa.array(np.arange(rows)),
    }
    for name in (data.time, data.weight):
        if name:
            columns[name] = pa.array(rng.integers(1, 10**9, rows) if name == data.time else rng.random(rows) + 0.5)
    for feature in data.sparse:
        if feature.column in columns:
            continue
        sharing = [f for f in data.sparse if f.column == feature.column]
        if all(f.encoding == "bucketise" for f in sharing):
            columns[feature.column] = pa.array(rng.uniform(0, 2 * feature.edges[-1] + 1, rows))
            continue
        longest = max(f.max_length for f in sharing)
        lengths = rng.integers(1, max(longest, 1) + 1, rows)
        limit = min(f.rows for f in sharing if f.encoding != "bucketise")
        ids = (rng.random(lengths.sum()) ** 2 * limit).astype(np.int64)
        values: pa.Array = pa.array(ids)
        if all(f.encoding == "vocabulary" for f in sharing):
            values = pa.array([f"v{i}" for i in range(WORDS)]).take(pa.array(ids % WORDS))
        if longest:
            values = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)), pa.int32()), values)
        columns[feature.column] = values
    for dense in data.dense:
        columns.setdefault(dense.column, pa.array(rng.gamma(2.0, 3.0, rows)))
    columns.setdefault(data.user_id, pa.array(rng.integers(0, max(rows // 20, 1), rows)))
    return pa.table(columns)


def write(data: DataConfig, rows: int, folder: Path) -> None:
    folder.mkdir(parents=True)
    pq.write_table(table(data, rows), folder / "part0.parquet", row_group_size=ROW_GROUP, compression="zstd")


def in_memory(data: DataConfig, merged: MergedTable, rows: tuple[int, ...], batch: int, batches: int) -> list[Columns]:
    """Batches as tensors, every id already a row of the merged table."""
    impressions = table(data, batch * batches, seed=1)
    return list(_batches(data, impressions, merged, rows, batch))


def _batches(
    data: DataConfig, impressions: pa.Table, merged: MergedTable, rows: tuple[int, ...], batch: int
) -> Iterator[Columns]:
    single = all(feature.max_length == 0 for feature in data.sparse)
    for start in range(0, len(impressions), batch):
        part = impressions.slice(start, batch).combine_chunks()
        dense = [_standardised(part[d.column]) for d in data.dense]
        row, bag = [], []
        for n, feature in enumerate(data.sparse):
            values, lengths = _ids(part[feature.column], batch, feature.encoding == "hash")
            row.append(values % rows[n] + int(merged.start_N[n]))
            bag.append(np.repeat(np.arange(batch), lengths) + n * batch)
        yield Columns(
            dense_BF=torch.from_numpy(np.stack(dense, 1)) if dense else torch.zeros(batch, 0),
            label_B=torch.from_numpy(part[data.label].to_numpy().astype(np.float32)),
            weight_B=torch.ones(batch),
            member_B2=torch.zeros(batch, 2),
            row_V=torch.from_numpy(np.concatenate(row)),
            bag_V=None if single else torch.from_numpy(np.concatenate(bag)),
        )


def _standardised(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    values = column.to_numpy().astype(np.float64)
    return ((values - values.mean()) / (values.std() + 1e-9)).astype(np.float32)


def _ids(column: pa.ChunkedArray, batch: int, hashed: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(values, how many every row has); hashed as c2al hashes them, so that lookups meet the caches alike. Other
    strings and numbers become small integers."""
    array = column.combine_chunks()
    lengths = np.ones(batch, np.int64)
    if pa.types.is_list(array.type):
        lengths = array.value_lengths().to_numpy().astype(np.int64)
        array = array.flatten()
    if hashed:
        return (hash64(array) >> np.uint64(1)).astype(np.int64), lengths
    if pa.types.is_string(array.type):
        array = array.dictionary_encode().indices
    return array.to_numpy(zero_copy_only=False).astype(np.int64), lengths
