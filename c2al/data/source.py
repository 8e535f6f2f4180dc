"""Parquet files behind any pyarrow filesystem, opened by footer and read a row group at a time."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from c2al.data.arrow_types import converted, is_text, leaf, readable
from c2al.data.paths import Found, find
from c2al.errors import DataError
from c2al.text import redacted

FOOTER_THREADS = 8
"""Footers read at a time: an object store answers in tens of milliseconds, so waiting overlaps."""
TAIL_BYTES = 1 << 16
"""Read at once from the end of a file, where the footer is: one request in most cases."""
KEPT_FOOTERS = 8
"""Parsed footers that are kept. A footer lists all row groups, so that reading it for each of them would make the time
of a scan grow with their square. All footers of a data set would grow with it. A footer is found again by
its `File`, and by the file's size and end: a file that was replaced is read by its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One Parquet file whose footer was readable."""

    name: str
    """Path or URI without secrets, as messages show it."""
    filesystem: pafs.FileSystem
    path: str
    schema: pa.Schema
    """Columns with the types they are read with (see `c2al.data.arrow_types.readable`). Hive partition
    keys of the path come last, as int64 or string, unless the file has a column of that name itself."""
    row_group_rows: tuple[int, ...]
    partition: Mapping[str, int | str | None] = dataclasses.field(default_factory=dict)
    """Values of the partition keys that are columns."""
    _opened: object = dataclasses.field(default_factory=object, repr=False, compare=False)
    """Of no other file, whatever its path and size."""

    def read(self, row_group: int, columns: Sequence[str], dictionary: Sequence[str] = ()) -> pa.Table:
        """One row group's `columns`; strings among those in `dictionary` come dictionary-encoded.

        Raises DataError naming file and row group if the pages cannot be decoded, and the column if its
        text is not UTF-8.
        """
        stored = [c for c in columns if c not in self.partition]
        encoded = [
            c for c in dictionary if c in stored and self.schema.field(c).type in (pa.string(), pa.large_string())
        ]
        try:
            with self.filesystem.open_input_file(self.path) as handle:
                reader = pq.ParquetFile(
                    handle, metadata=_footer(handle, self._opened), read_dictionary=encoded, pre_buffer=True
                )
                table = reader.read_row_group(row_group, columns=stored, use_threads=False)
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{self.where(row_group)}: cannot be decoded: {redacted(str(e))}") from e
        return pa.table({c: self._column(table, c, row_group) for c in columns})

    def _column(self, table: pa.Table, column: str, row_group: int) -> pa.ChunkedArray:
        if column in self.partition:
            value = pa.scalar(self.partition[column], self.schema.field(column).type)
            return pa.chunked_array([pa.repeat(value, self.row_group_rows[row_group])])
        return readable_column(table[column], column, self.where(row_group))

    def where(self, row_group: int) -> str:
        """How messages name a row group."""
        return f"{self.name}, row group {row_group}"


@dataclasses.dataclass(frozen=True)
class _End:
    """The end of a file, by which its footer is found again."""

    opened: object
    size: int
    tail: bytes
    file: pa.NativeFile = dataclasses.field(compare=False)


def _footer(file: pa.NativeFile, opened: object) -> pq.FileMetaData:
    """The file's parsed footer. Raises pyarrow.ArrowInvalid or OSError if there is none."""
    size = file.size()
    return _parsed(_End(opened, size, file.read_at(min(size, TAIL_BYTES), max(size - TAIL_BYTES, 0)), file))


@functools.lru_cache(maxsize=KEPT_FOOTERS)
def _parsed(end: _End) -> pq.FileMetaData:
    length = int.from_bytes(end.tail[-8:-4], "little") + 8
    footer = end.tail[-length:]
    if TAIL_BYTES < length <= end.size:
        footer = end.file.read_at(length, end.size - length)
    return pq.read_metadata(pa.BufferReader(footer))


def readable_column(values: pa.ChunkedArray, column: str, where: str) -> pa.ChunkedArray:
    """The column with its `readable` type. Raises DataError naming the column whose text is not UTF-8."""
    try:
        if is_text(leaf(values.type)):
            # Parquet's reader takes any bytes for text. Unchecked, they fail deep inside a job.
            for chunk in values.chunks:
                _validate(chunk)
        return converted(values, readable(values.type))
    except pa.ArrowException as e:
        raise DataError(f"{where}: column '{column}' cannot be decoded: {e}") from e


def _validate(array: pa.Array) -> None:
    """Raises pyarrow.ArrowInvalid unless all text is UTF-8 and all indices lie within their dictionary.

    pyarrow's own check of a dictionary costs 5% of a scan that reads text as a dictionary: it takes the
    indices one by one. Parquet's decoder does not look at them.
    """
    if not pa.types.is_dictionary(array.type):
        array.validate(full=True)
        return
    array.validate()
    _validate(array.dictionary)
    range_ = pc.min_max(array.indices)
    low, high = range_["min"].as_py(), range_["max"].as_py()
    if low is not None and not 0 <= low <= high < len(array.dictionary):
        raise pa.ArrowInvalid(f"indices {low} to {high} of a dictionary with {len(array.dictionary)} values")


def open_dataset(paths: Iterable[str]) -> tuple[File, ...]:
    """The Parquet files of `paths`, sorted by name, each with a readable footer.

    A path is a file, a folder or a pattern, local or a URI; `c2al.data.paths.find` says what each
    means. Folders named key=value on the way to a file make `key` a column of it.

    Raises DataError naming the path that does not exist or matches nothing, the file that is not whole
    Parquet, or all paths if they hold no rows.
    """
    if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable):
        raise DataError(f"data set: expected a list of paths, got {paths!r}")
    paths = list(paths)
    if not paths:
        raise DataError("data set: no path is configured")
    if odd := [p for p in paths if not isinstance(p, str)]:
        raise DataError(f"data set: expected paths as text, got {odd[0]!r}")
    found = find(paths)
    kinds = _partition_kinds(found)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        files = tuple(pool.map(lambda f: _open(f, kinds), found))
    if not any(sum(f.row_group_rows) for f in files):
        raise DataError(f"{', '.join(map(redacted, paths))}: {len(files)} Parquet file(s) hold 0 rows")
    return files


def _partition_kinds(found: Sequence[Found]) -> dict[str, pa.DataType]:
    """Type of every partition key: int64 where each of its values in the data set is an integer, else string."""
    values: dict[str, set[str]] = {}
    for file in found:
        for key, value in file.partition().items():
            values.setdefault(key, set()).update([] if value is None else [value])
    return {
        key: pa.int64() if all(re.fullmatch(r"-?[0-9]{1,18}", v) for v in known) else pa.string()
        for key, known in values.items()
    }


def _open(found: Found, kinds: Mapping[str, pa.DataType]) -> File:
    try:
        with found.filesystem.open_input_file(found.path) as handle:
            reader = pq.ParquetFile(handle)
            rows = tuple(reader.metadata.row_group(i).num_rows for i in range(reader.num_row_groups))
            stored = reader.schema_arrow
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{found.name}: not a whole Parquet file: {redacted(str(e))}") from e
    fields = [field.with_type(readable(field.type)) for field in stored]
    partition: dict[str, int | str | None] = {}
    for key, value in found.partition().items():
        if key not in stored.names:
            partition[key] = int(value) if value is not None and kinds[key] == pa.int64() else value
            fields.append(pa.field(key, kinds[key]))
    return File(
        name=found.name,
        filesystem=found.filesystem,
        path=found.path,
        schema=pa.schema(fields),
        row_group_rows=rows,
        partition=partition,
    )
