"""Paths of a data set -> its Parquet files: folders, patterns, URIs and Hive partition folders."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from c2al.errors import DataError
from c2al.text import redacted

MAGIC = b"PAR1"
"""The first bytes of every Parquet file."""
SIDECARS = frozenset((".md", ".txt", ".json", ".toml", ".yaml", ".yml", ".html", ".pdf", ".log", ".crc", ".sha256"))
"""Endings of files that describe data. A folder may hold them beside its Parquet files."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Hive's and Spark's name of the partition whose key is null."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One data file of a path."""

    name: str
    """As messages show it, without secrets."""
    filesystem: pafs.FileSystem
    path: str

    def partition(self) -> dict[str, str | None]:
        """Hive partition keys: what the folders named key=value on the way to the file say."""
        pairs = [part.partition("=") for part in PurePosixPath(self.path).parts[:-1] if "=" in part]
        return {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, _, value in pairs if key}


def find(paths: Iterable[str]) -> list[Found]:
    """The data files of all paths, sorted by name; a file reached twice counts once.

    A path is a file, a folder or a pattern, local or a URI of any pyarrow filesystem.

    - A folder is searched at any depth. Names that begin with "_" or "." are not data. A file is data
      if its name ends in ".parquet" or its first bytes are Parquet's. Files whose endings are in
      `SIDECARS` are passed over; any other file is refused, since it may be data that would be missed.
    - In a pattern, "*" stands for any characters within a name and "**" for any folders, also none,
      whose names do not begin with "_" or ".". Nothing else is special, so names may hold brackets,
      question marks and quotes. A folder that a pattern matches is searched like any folder. What
      exists under the very name of a pattern is taken as it is.

    Raises DataError naming the path that does not exist, cannot be listed or matches nothing, or the
    file that is refused; and for an empty path, as an unset variable leaves it.
    """
    paths = list(paths)
    if "" in paths:
        raise DataError("'': an empty path; write . for the current folder")
    found = {f.name: f for path in paths for f in _expand(path)}
    return [found[name] for name in sorted(found)]


def _expand(path: str) -> list[Found]:
    try:
        fs, inner = pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), str(Path(path)))
        info = fs.get_file_info(inner)
        if info.type == pafs.FileType.NotFound and "*" in inner:
            names = [name for match in _matches(fs, inner) for name in _files_of(fs, match)]
        elif info.type == pafs.FileType.NotFound:
            raise DataError(f"{redacted(path)}: no such file or folder")
        else:
            names = _files_of(fs, info)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{redacted(path)}: cannot be listed: {redacted(str(e))}") from e
    if not names:
        raise DataError(f"{redacted(path)}: no Parquet file there")
    local = isinstance(fs, pafs.LocalFileSystem)
    return [Found(name if local else redacted(f"{fs.type_name}://{name}"), fs, name) for name in names]


def _files_of(fs: pafs.FileSystem, info: pafs.FileInfo) -> list[str]:
    """A file itself, or the data files of a folder."""
    if info.is_file:
        return [info.path]
    depth = len(PurePosixPath(info.path).parts)
    return [
        child.path
        for child in fs.get_file_info(pafs.FileSelector(info.path, recursive=True))
        if child.is_file
        and not any(part[0] in "_." for part in PurePosixPath(child.path).parts[depth:])
        and _is_data(fs, child.path)
    ]


def _is_data(fs: pafs.FileSystem, path: str) -> bool:
    """Whether a file in a folder is Parquet. Raises DataError for one that may be data in another form."""
    if path.endswith(".parquet"):
        return True
    if PurePosixPath(path).suffix.lower() in SIDECARS:
        return False
    with fs.open_input_file(path) as handle:
        start = handle.read(len(MAGIC))
    if start != MAGIC:
        raise DataError(
            f"{redacted(path)}: not a Parquet file (it begins with {start!r}); convert it, or move it out of the "
            "folder, or let its name begin with '_'"
        )
    return True


def _matches(fs: pafs.FileSystem, pattern: str) -> list[pafs.FileInfo]:
    """Files and folders that a pattern with "*" matches; none inside another one of them."""
    parts = PurePosixPath(pattern).parts
    while parts[-1] == "**":
        # All files at any depth below a folder: what the folder itself means.
        parts = parts[:-1]
        if not any("*" in part for part in parts):
            return [fs.get_file_info(str(PurePosixPath(*parts)))]
    fixed = next(i for i, part in enumerate(parts) if "*" in part)
    base = str(PurePosixPath(*parts[:fixed])) if fixed else "."
    deep = "**" in parts or len(parts) > fixed + 1
    listed = fs.get_file_info(pafs.FileSelector(base, recursive=deep, allow_not_found=True))
    wanted = re.compile(_regex(parts[fixed:]), re.DOTALL)
    start = len(PurePosixPath(base).parts)
    matches = [i for i in listed if wanted.fullmatch("/".join(PurePosixPath(i.path).parts[start:]))]
    matches = [fs.get_file_info(str(PurePosixPath(i.path))) for i in matches]
    folders = {PurePosixPath(i.path) for i in matches if not i.is_file}
    return [i for i in matches if not folders & set(PurePosixPath(i.path).parents)]


def _regex(parts: Iterable[str]) -> str:
    """Regular expression of the parts of a pattern, joined by "/"."""
    pieces = []
    for part in parts:
        if part == "**":
            pieces.append(r"(?:[^/_.][^/]*/)*")
        else:
            pieces.append("[^/]*".join(re.escape(text) for text in part.split("*")) + "/")
    return "".join(pieces).removesuffix("/")
