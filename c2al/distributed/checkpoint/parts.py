"""Chosen rows of the tensors in a finished checkpoint, read where they are needed and without a collective.

For a model that is not the checkpoint's own, whose rows lie elsewhere. A run that goes on is loaded by
`CheckpointReader`.

R rows of a tensor, D columns.
"""

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from c2al.distributed.checkpoint.manifest import DTYPES, MARKER, TENSORS, Manifest, StoredChunk, StoredTensors
from c2al.distributed.checkpoint.state import moment_key
from c2al.errors import CheckpointError


class StoredParts:
    """The tensors of one checkpoint, mapped read-only into memory.

    This rank compares its share of the files with their checksums. Raises CheckpointError for a
    checkpoint that is not whole.
    """

    def __init__(self, folder: Path, rank: int = 0, size: int = 1):
        self._folder = folder
        self.manifest = Manifest.read(folder)
        if TENSORS not in self.manifest.files:
            raise CheckpointError(f"{folder / MARKER}: damaged: it does not list {TENSORS}")
        self.manifest.verify(folder, rank, size)
        self._tensors = StoredTensors.read(folder, self.manifest.files).tensors

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def size(self, key: str) -> tuple[int, ...]:
        """Raises CheckpointError when the checkpoint has no such tensor."""
        if key not in self._tensors:
            raise CheckpointError(f"{self._folder / TENSORS}: damaged: '{key}' is not there")
        return self._tensors[key].size

    def whole(self, key: str) -> torch.Tensor:
        """The tensor of this key, on the host."""
        size = self.size(key)
        flat = torch.zeros(size or (1,), dtype=DTYPES[self._tensors[key].dtype])
        for chunk in self._tensors[key].chunks:
            part = flat
            for dim, (start, length) in enumerate(zip(chunk.offset, chunk.size, strict=True)):
                part = part.narrow(dim, start, length)
            part.copy_(self._mapped(key, chunk).view(part.shape))
        return flat.view(size)

    def fill_rows(self, key: str, row_R: npt.NDArray[np.int64], out_RD: torch.Tensor, column: int = 0) -> None:
        """Row i of `out_RD` becomes row row_R[i] of the tensor, from its column `column` on.

        Rows with row_R[i] = -1 are left as they are. `out_RD` lies on the host; of a vector it is (R, 1).
        """
        self.size(key)
        last = column + out_RD.shape[1]
        for chunk in self._tensors[key].chunks:
            height, width = chunk.size if len(chunk.size) > 1 else (*chunk.size, 1)
            row, first = chunk.offset if len(chunk.size) > 1 else (*chunk.offset, 0)
            begin, end = max(first, column), min(first + width, last)
            at_R = np.flatnonzero((row_R >= row) & (row_R < row + height))
            if begin >= end or not len(at_R):
                continue
            part = self._mapped(key, chunk).view(height, width)[:, begin - first : end - first]
            out_RD[torch.from_numpy(at_R), begin - column : end - column] = part[torch.from_numpy(row_R[at_R] - row)]

    def moment_blocks(self, table: str) -> list[tuple[int, int, str]]:
        """(first column, end, key) of every column block of a table that had moments of its own."""
        pattern = re.compile(re.escape(moment_key(table, 0, 0).removesuffix("0-0")) + r"(\d+)-(\d+)")
        found = [(match, key) for key in self._tensors if (match := pattern.fullmatch(key))]
        return sorted((int(m[1]), int(m[2]), key) for m, key in found)

    def _mapped(self, key: str, chunk: StoredChunk) -> torch.Tensor:
        """(values,) of one block."""
        dtype = DTYPES[self._tensors[key].dtype]
        count = math.prod(chunk.size) * dtype.itemsize
        if not count:
            return torch.zeros(0, dtype=dtype)
        try:
            # Copy on write: the file is only read, and torch takes no array that cannot be written.
            content = np.memmap(self._folder / chunk.file, np.uint8, mode="c", offset=chunk.start, shape=(count,))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self._folder / chunk.file}: cannot be read: {e}") from e
        return torch.from_numpy(content).view(dtype)
