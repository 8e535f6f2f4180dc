"""The marker of a folder of scores: `_complete.json`, which lists every part and is written last.

A folder without the marker was never finished. A folder that has lost a part, or some rows of one, does
not fit its marker. A marker that is a JSON object without a "format" was written by hand or by an early
c2al: it says that the folder is complete, but not what belongs to it.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from c2al.data.source import File, open_dataset
from c2al.errors import DataError
from c2al.state import parse_json, parse_state, write_state

COMPLETE = "_complete.json"
FORMAT = "c2al.scores"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of a folder of scores."""

    name: str
    rows: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoresMarker:
    """What a finished folder of scores holds."""

    rows: int
    """Of all parts."""
    parts: tuple[Part, ...]
    """Ascending by name, which is the order of the rows."""


def write_marker(folder: Path, names: tuple[str, ...]) -> ScoresMarker:
    """Writes the marker of a folder that holds the parts `names`, as they are on disk, and returns it."""
    parts = tuple(_part(str(folder), name, pafs.LocalFileSystem()) for name in sorted(names))
    marker = ScoresMarker(rows=sum(p.rows for p in parts), parts=parts)
    write_state(folder / COMPLETE, marker, format=FORMAT, version=VERSION)
    return marker


def open_scored(paths: Sequence[str]) -> tuple[File, ...]:
    """`open_dataset` of scores; where a local folder has lost what its marker lists, the error says what to do."""
    try:
        return open_dataset(paths)
    except DataError:
        for path in paths:
            if os.path.isfile(f"{path}/{COMPLETE}"):
                check_marker(path)
        raise


def check_marker(folder: str | Path, filesystem: pafs.FileSystem | None = None) -> ScoresMarker | None:
    """Compares a folder of scores with its marker; None where the marker lists no parts.

    `folder` is a path of `filesystem`, by default the local one.
    Raises DataError naming the marker that is missing, damaged or foreign, the part that is missing,
    has another number of rows or bytes, or is not listed, and what to do about it.
    """
    path, fs = str(folder), filesystem or pafs.LocalFileSystem()
    again = f"; delete the folder {path} and make it again (`c2al score`, or the same `c2al experiment`)"
    marker_path = f"{path}/{COMPLETE}"
    try:
        if not fs.get_file_info(marker_path).is_file:
            raise DataError(f"{path}: incomplete, it has no {COMPLETE}{again}")
        with fs.open_input_file(marker_path) as handle:
            content = handle.read()
        present = [PurePosixPath(i.path).name for i in fs.get_file_info(pafs.FileSelector(path)) if i.is_file]
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{marker_path}: cannot be read: {e}") from e
    try:
        tree = parse_json(content, marker_path, DataError)
        if isinstance(tree, dict) and "format" not in tree:
            return None
        marker = parse_state(content, marker_path, ScoresMarker, format=FORMAT, version=VERSION, error=DataError)
    except DataError as e:
        raise DataError(f"{e}{again}") from e
    listed = {part.name: part for part in marker.parts}
    for name in sorted(n for n in present if n.endswith(".parquet") and n[0] not in "_." and n not in listed):
        raise DataError(f"{path}/{name}: {COMPLETE} does not list it; it is no part of these scores, move it away")
    for name, part in listed.items():
        if name not in present:
            raise DataError(f"{path}/{name}: missing; {COMPLETE} lists it with {part.rows:,} rows{again}")
        try:
            found = _part(path, name, fs)
        except DataError as e:
            raise DataError(f"{e}{again}") from e
        if found != part:
            raise DataError(
                f"{path}/{name}: has {found.rows:,} rows in {found.bytes:,} bytes, "
                f"but {COMPLETE} says {part.rows:,} rows in {part.bytes:,} bytes{again}"
            )
    if marker.rows != sum(part.rows for part in marker.parts):
        raise DataError(f"{marker_path}: says {marker.rows:,} rows, but its parts have another number of rows{again}")
    return marker


def _part(folder: str, name: str, fs: pafs.FileSystem) -> Part:
    try:
        with fs.open_input_file(f"{folder}/{name}") as handle:
            return Part(name=name, rows=pq.read_metadata(handle).num_rows, bytes=handle.size())
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{folder}/{name}: not a whole Parquet file: {e}") from e
