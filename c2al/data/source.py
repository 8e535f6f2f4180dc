"""Parquet files behind any pyarrow filesystem, opened by footer and read a row group at a time."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from c2al.errors import DataError

FOOTER_THREADS = 8
"""Footers read at a time: an object store answers in tens of milliseconds, so waiting overlaps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One Parquet file whose footer was readable."""

    name: str
    """Path or URI, as messages show it."""
    filesystem: pafs.FileSystem
    path: str
    schema: pa.Schema
    row_group_rows: tuple[int, ...]

    def read(self, row_group: int, columns: Sequence[str], dictionary: Sequence[str] = ()) -> pa.Table:
        """One row group's `columns`; strings among those in `dictionary` come dictionary-encoded.

        Raises DataError naming file and row group if the pages cannot be decoded. The footer is
        parsed again on each call: kept footers would grow with the data set.
        """
        encoded = [c for c in dictionary if self.schema.field(c).type in (pa.string(), pa.large_string())]
        try:
            with self.filesystem.open_input_file(self.path) as handle:
                reader = pq.ParquetFile(handle, read_dictionary=encoded, pre_buffer=True)
                return reader.read_row_group(row_group, columns=list(columns), use_threads=False).select(list(columns))
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{self.where(row_group)}: cannot be decoded: {e}") from e

    def where(self, row_group: int) -> str:
        """How messages name a row group."""
        return f"{self.name}, row group {row_group}"


def open_dataset(paths: Iterable[str]) -> tuple[File, ...]:
    """The Parquet files of `paths`, sorted by name, each with a readable footer.

    A path is a file, a folder (searched recursively; names starting with "_" or "." are not
    data) or a pattern with "*", local or a URI of any pyarrow filesystem. A file reached twice
    counts once.

    Raises DataError naming the path that does not exist or matches nothing, the file that is
    not whole Parquet, or all paths if they hold no rows.
    """
    paths = list(paths)
    if not paths:
        raise DataError("data set: no path is configured")
    found = {name: (fs, path) for p in paths for name, fs, path in _expand(p)}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        files = tuple(pool.map(lambda name: _open(name, *found[name]), sorted(found)))
    if not any(sum(f.row_group_rows) for f in files):
        raise DataError(f"{', '.join(map(_shown, paths))}: {len(files)} Parquet file(s) hold 0 rows")
    return files


def _expand(path: str) -> list[tuple[str, pafs.FileSystem, str]]:
    """(shown name, filesystem, path in it) of every data file under one path."""
    try:
        if "://" in path:
            fs, inner = pafs.FileSystem.from_uri(path)
        else:
            fs, inner = pafs.LocalFileSystem(), str(Path(path))
        if "*" in inner:
            parts = PurePosixPath(inner).parts
            fixed = next(i for i, part in enumerate(parts) if "*" in part)
            base = str(PurePosixPath(*parts[:fixed])) if fixed else "."
            listed = fs.get_file_info(pafs.FileSelector(base, recursive=len(parts) > fixed + 1))
            names = [
                str(PurePosixPath(info.path))
                for info in listed
                if info.is_file
                and len(PurePosixPath(info.path).parts) == len(parts)
                and PurePosixPath(info.path).match(inner)
            ]
        else:
            info = fs.get_file_info(inner)
            if info.type == pafs.FileType.NotFound:
                raise DataError(f"{_shown(path)}: no such file or folder")
            if info.is_file:
                names = [inner]
            else:
                depth = len(PurePosixPath(inner).parts)
                names = [
                    child.path
                    for child in fs.get_file_info(pafs.FileSelector(inner, recursive=True))
                    if child.is_file
                    and child.path.endswith(".parquet")
                    and not any(part[0] in "_." for part in PurePosixPath(child.path).parts[depth:])
                ]
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{_shown(path)}: cannot be listed: {e}") from e
    if not names:
        raise DataError(f"{_shown(path)}: no Parquet file there")
    local = isinstance(fs, pafs.LocalFileSystem)
    return [(name if local else f"{fs.type_name}://{name}", fs, name) for name in names]


def _shown(path: str) -> str:
    """The path without the credentials a URI may carry."""
    return re.sub(r"://[^/@]*@", "://", path)


def _open(name: str, fs: pafs.FileSystem, path: str) -> File:
    try:
        with fs.open_input_file(path) as handle:
            reader = pq.ParquetFile(handle)
            rows = tuple(reader.metadata.row_group(i).num_rows for i in range(reader.num_row_groups))
            return File(name=name, filesystem=fs, path=path, schema=reader.schema_arrow, row_group_rows=rows)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name}: not a whole Parquet file: {e}") from e
