"""Which files a job read, so that a resumed job can tell whether they are still the same.

A Parquet footer holds the sizes, offsets, row counts and value statistics of every column chunk, so
nearly every change of the data changes the footer. It does not change when values of one width swap
places, as when labels are shuffled. Therefore bytes of the data pages enter as well: all of a small
file, and the head of every column chunk of the first row group of a larger one. What stays unseen is
a change in a larger file that keeps every size and every statistic and lies elsewhere.
"""

import dataclasses
import datetime
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from c2al.data.source import File
from c2al.errors import DataError
from c2al.text import redacted

IDENTITY_THREADS = 16
"""Files read at a time: an object store answers in tens of milliseconds, so waiting overlaps."""
WHOLE_BYTES = 4 << 20
"""A file of at most this many bytes is hashed whole: one read."""
HEAD_BYTES = 4096
"""Bytes hashed of a column chunk. A 0/1 label takes one bit per row, so these are 32,768 labels."""
MOST_DIFFERENCES = 5
"""Files that `differences` describes; the rest are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What one Parquet file was when a job read it."""

    name: str
    """Path or URI without secrets."""
    size: int
    """Bytes."""
    modified: str
    """UTC, ISO 8601; empty where the file system does not tell. For people: a copy of a file is the same file."""
    row_group_rows: tuple[int, ...]
    footer_sha256: str
    pages_sha256: str = ""
    """Of the bytes outside the footer that this module's docstring names."""


def identify(files: Sequence[File]) -> tuple[FileIdentity, ...]:
    """The identity of every file, in order. Raises DataError naming a file that cannot be read."""
    with ThreadPoolExecutor(IDENTITY_THREADS) as pool:
        return tuple(pool.map(_identify, files))


def _identify(file: File) -> FileIdentity:
    try:
        modified = file.filesystem.get_file_info(file.path).mtime
        with file.filesystem.open_input_file(file.path) as handle:
            size = handle.size()
            # The last 8 bytes are the footer's length, little-endian, and the magic number.
            length = int.from_bytes(handle.read_at(4, size - 8), "little") if size >= 12 else size
            if length > size - 12:
                raise DataError(f"{redacted(file.name)}: not a whole Parquet file any more")
            footer = handle.read_at(length + 8, size - length - 8)
            pages = hashlib.sha256()
            for start, count in _sampled(handle, size):
                pages.update(handle.read_at(count, start))
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{redacted(file.name)}: cannot be read: {redacted(str(e))}") from e
    return FileIdentity(
        name=redacted(file.name),
        size=size,
        modified="" if modified is None else modified.astimezone(datetime.UTC).isoformat(),
        row_group_rows=file.row_group_rows,
        footer_sha256=hashlib.sha256(footer).hexdigest(),
        pages_sha256=pages.hexdigest(),
    )


def _sampled(handle: pa.NativeFile, size: int) -> list[tuple[int, int]]:
    """(start, bytes) of the parts of the file that `pages_sha256` covers."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    metadata = pq.read_metadata(handle)
    if not metadata.num_row_groups:
        return []
    group = metadata.row_group(0)
    ranges = []
    for i in range(group.num_columns):
        chunk = group.column(i)
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        # A long dictionary would fill the sample, so the values have a sample of their own.
        for begin in {start, chunk.data_page_offset}:
            ranges.append((begin, min(HEAD_BYTES, start + chunk.total_compressed_size - begin)))
    return sorted(ranges)


def differences(before: Sequence[FileIdentity], now: Sequence[FileIdentity]) -> list[str]:
    """What changed from `before` to `now`, one sentence per file; empty: the files are the same.

    A file that was only touched or copied in place, so that its time alone differs, is the same.
    """
    old, new = {f.name: f for f in before}, {f.name: f for f in now}
    found = [f"{name}: is not there any more" for name in old if name not in new]
    found += [f"{name}: was not there before" for name in new if name not in old]
    for name in sorted(old.keys() & new.keys()):
        changes = _changes(old[name], new[name])
        if changes:
            found.append(f"{name}: {', '.join(changes)}")
    if len(found) > MOST_DIFFERENCES:
        return [*found[:MOST_DIFFERENCES], f"and {len(found) - MOST_DIFFERENCES} more files differ"]
    return found


def _changes(before: FileIdentity, now: FileIdentity) -> list[str]:
    rows_before, rows_now = sum(before.row_group_rows), sum(now.row_group_rows)
    changes = []
    if rows_before != rows_now:
        changes.append(f"had {rows_before:,} rows, has {rows_now:,}")
    elif before.row_group_rows != now.row_group_rows:
        changes.append(
            f"has its rows in other row groups ({len(before.row_group_rows)} before, {len(now.row_group_rows)} now)"
        )
    if before.size != now.size:
        changes.append(f"had {before.size:,} bytes, has {now.size:,}")
    if not changes and before.footer_sha256 != now.footer_sha256:
        changes.append("has the same size and other content (its Parquet footer differs)")
    elif not changes and before.pages_sha256 != now.pages_sha256:
        changes.append("has the same size and other content (its data pages differ)")
    return changes
