"""Parquet out: whole folders or nothing, in row groups of one size, with pinned writer options."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from c2al.errors import DataError

SPLITS = ("train", "validation", "test")

ROW_GROUP_ROWS = 32768
"""Small enough that every logical shard of a data set of some hundred thousand rows gets row
groups of its own, large enough that decoding is not dominated by page headers."""

FILE_ROWS = 128 * ROW_GROUP_ROWS


class SplitWriter:
    """Appends tables to the Parquet files of named splits: <folder>/<split>/part-00000.parquet, ...

    Memory is one row group per split. The bytes depend only on the rows and the pyarrow version,
    not on how the rows were cut into tables.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._splits: dict[str, _Split] = {}

    def write(self, split: str, table: pa.Table) -> None:
        if split not in self._splits:
            self._splits[split] = _Split(self._folder / split)
        self._splits[split].write(table)

    def close(self) -> dict[str, int]:
        """Writes what is left; rows of each split."""
        return {name: split.close() for name, split in self._splits.items()}

    def close_published(self, source: Path) -> dict[str, int]:
        """`close` of a published set; rows of each of `SPLITS`, 0 for one that a partial set leaves empty.

        Raises DataError naming `source` if there is nothing to train on.
        """
        rows = self.close()
        if not rows.get("train"):
            found = ", ".join(f"{name} {rows.get(name, 0):,}" for name in SPLITS)
            raise DataError(f"{source}: leaves the split train without a row (rows: {found})")
        return {name: rows.get(name, 0) for name in SPLITS}


class _Split:
    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder = folder
        self._rows = 0
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        while sum(t.num_rows for t in self._waiting) >= ROW_GROUP_ROWS:
            self._row_group()

    def close(self) -> int:
        if any(t.num_rows for t in self._waiting):
            self._row_group()
        if self._writer is not None:
            self._writer.close()
        return self._rows

    def _row_group(self) -> None:
        waiting = pa.concat_tables(self._waiting)
        group = waiting.slice(0, ROW_GROUP_ROWS).combine_chunks()
        self._waiting = [waiting.slice(ROW_GROUP_ROWS)]
        if self._rows % FILE_ROWS == 0:
            if self._writer is not None:
                self._writer.close()
            part = self._folder / f"part-{self._rows // FILE_ROWS:05d}.parquet"
            self._writer = pq.ParquetWriter(part, group.schema, compression="zstd", compression_level=1, version="2.6")
        assert self._writer is not None
        self._writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
        self._rows += group.num_rows
