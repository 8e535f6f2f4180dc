"""The two state files of a checkpoint: complete.json (what it is) and tensors.json (where its numbers lie)."""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from c2al.errors import CheckpointError
from c2al.state import read_state, write_state
from c2al.typed import Problems

MARKER = "complete.json"
TENSORS = "tensors.json"
PREFIX = "step-"
HIDDEN = ".unfinished-"
"""Prefix of folders that are being written or deleted. Readers pass over them; the next writer removes them."""
VERSION = 2

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 (hexadecimal) of a file in a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of complete.json, which is written last."""

    step: int
    ne: float | None
    """Validation NE of exactly these weights; None where they were not evaluated."""
    extra: dict[str, Any]
    """What the caller of `CheckpointWriter.save` gave."""
    optimizer: dict[str, int]
    model: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer."""
    column_blocks: dict[str, int]
    """Table -> number of column blocks, each of which had row-wise Adagrad moments of its own."""
    files: dict[str, StoredFile]

    def problems(self) -> Problems:
        if self.step < 0:
            yield "step", f"must not be negative, is {self.step}"
        if "steps" not in self.optimizer:
            yield "optimizer", "has no 'steps'"
        for name in self.files:
            if not _plain(name):
                yield "files", f"{name!r} is not the plain name of a file"
        for name, shape in self.model.items():
            if any(n < 0 for n in shape):
                yield "model", f"parameter {name!r} has the shape {list(shape)}"

    def write(self, folder: Path) -> None:
        write_state(folder / MARKER, self, format="checkpoint", version=VERSION)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises CheckpointError when `folder` is no finished checkpoint, or complete.json is not as it was written."""
        if not (folder / MARKER).exists():
            raise CheckpointError(f"{folder}: no finished checkpoint, {MARKER} is missing")
        return read_state(folder / MARKER, cls, format="checkpoint", version=VERSION, error=CheckpointError)

    def verify(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        """Compares this rank's share of the files with their checksums; raises CheckpointError naming one."""
        for name, stored in sorted(self.files.items())[rank::size]:
            path = folder / name
            try:
                if path.stat().st_size != stored.bytes:
                    raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {stored.bytes}")
                if digest_of(path) != stored.sha256:
                    raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one {MARKER} names")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


@dataclass(frozen=True)
class StoredChunk:
    """A block of a tensor, as raw little-endian numbers in row-major order, and its place in a file."""

    file: str
    start: int
    """Of its bytes in the file."""
    offset: tuple[int, ...]
    """Of the block in the tensor."""
    size: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the blocks it is stored in."""

    dtype: str
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]

    def problems(self) -> Problems:
        if self.dtype not in DTYPES:
            yield "dtype", f"{self.dtype!r} is none of {', '.join(DTYPES)}"
        if any(n < 0 for n in self.size):
            yield "size", f"{list(self.size)} is negative"
        for i, c in enumerate(self.chunks):
            inside = len(c.offset) == len(c.size) == len(self.size) and all(
                o >= 0 and n >= 0 and o + n <= whole for o, n, whole in zip(c.offset, c.size, self.size, strict=True)
            )
            if not inside or c.start < 0:
                yield f"chunks[{i}]", f"{list(c.offset)} + {list(c.size)} at {c.start} is not in {list(self.size)}"


@dataclass(frozen=True)
class StoredTensors:
    """Content of tensors.json: key -> tensor."""

    tensors: dict[str, StoredTensor]

    def write(self, folder: Path) -> None:
        write_state(folder / TENSORS, self, format="checkpoint tensors", version=VERSION)

    @classmethod
    def read(cls, folder: Path, files: dict[str, StoredFile]) -> "StoredTensors":
        """Raises CheckpointError, naming tensors.json, when it is damaged or goes beyond the checkpoint's `files`."""
        path = folder / TENSORS
        stored = read_state(path, cls, format="checkpoint tensors", version=VERSION, error=CheckpointError)
        for key, tensor in stored.tensors.items():
            for chunk in tensor.chunks:
                if chunk.file not in files:
                    raise CheckpointError(f"{path}: '{key}': {chunk.file!r} is not one of the files in {MARKER}")
                end = chunk.start + math.prod(chunk.size) * DTYPES[tensor.dtype].itemsize
                if end > files[chunk.file].bytes:
                    raise CheckpointError(
                        f"{path}: '{key}': byte {end} is beyond the end of {chunk.file} ({files[chunk.file].bytes})"
                    )
        return stored


def finished(directory: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """The finished checkpoints of `directory` by ascending step, and what is wrong with each damaged one.

    Checkpoints may appear and be deleted while this looks. A `directory` that is not there holds none.
    Raises CheckpointError when it cannot be read.
    """
    good, damaged = [], []
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(PREFIX))
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise CheckpointError(f"{directory}: cannot be read: {e.strerror}") from e
    for path in (directory / name for name in names):
        try:
            manifest = Manifest.read(path)
        except CheckpointError as e:
            if path.exists():
                damaged.append(str(e))
            continue
        if path.name == folder_name(manifest.step):
            good.append((path, manifest))
        else:
            damaged.append(f"{path}: its {MARKER} is of step {manifest.step}")
    return sorted(good, key=lambda entry: entry[1].step), damaged


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def digest_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and "\0" not in name
