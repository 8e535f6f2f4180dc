"""DCP's storage interface over files of raw numbers.

DCP's own file format holds pickles: the metadata, which it loads without restriction, and every
tensor. Here a rank's file is nothing but its tensors' bytes, one after the other, and tensors.json
says where each block lies. Nothing in a checkpoint can run when it is loaded.
"""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from c2al.distributed.checkpoint.manifest import DTYPES, StoredChunk, StoredTensor, StoredTensors
from c2al.errors import CheckpointError

READ_BYTES = 64 * 2**20
"""Most that is read at once. A block of a table may be as large as half of the memory."""


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


class RawWriter(StorageWriter):
    """Writes this rank's blocks to one file, and on rank 0 tensors.json."""

    def __init__(self, folder: Path, rank: int):
        self._folder, self._rank = folder, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with (self._folder / file_name(self._rank)).open("wb") as f:
            for item in plan.items:
                start = f.tell()
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                f.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                results.append(WriteResult(item.index, f.tell() - start, (file_name(self._rank), start)))
            f.flush()
            os.fsync(f.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = []
            for chunk in tensor.chunks:
                name, start = places[MetadataIndex(key, chunk.offsets)]
                chunks.append(StoredChunk(name, start, tuple(chunk.offsets), tuple(chunk.sizes)))
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[key] = StoredTensor(dtype, tuple(tensor.size), tuple(chunks))
        StoredTensors(tensors).write(self._folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class RawReader(StorageReader):
    """Reads what `RawWriter` wrote, and of each block only the rows that are wanted."""

    def __init__(self, folder: Path, stored: StoredTensors):
        self._folder, self._stored = folder, stored
        self._chunks = {
            MetadataIndex(key, chunk.offset): (DTYPES[tensor.dtype], chunk)
            for key, tensor in stored.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.size),
                    [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in tensor.chunks],
                )
                for key, tensor in self._stored.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self._chunks[item.storage_index][1].file, []).append(item)
        for name, items in per_file.items():
            path = self._folder / name
            try:
                with path.open("rb") as f:
                    for item in items:
                        self._read(f, item, planner.resolve_tensor(item).detach())
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, f: BinaryIO, item: ReadItem, target: torch.Tensor) -> None:
        """Copies the wanted part of a block to `target`, some rows at a time."""
        dtype, chunk = self._chunks[item.storage_index]
        if not target.numel():
            return
        # A scalar is a vector of one here, as its block and as its target.
        size, first = chunk.size or (1,), tuple(item.storage_offsets) or (0,)
        target = target if target.dim() else target[None]
        row = math.prod(size[1:]) * dtype.itemsize
        step = max(1, READ_BYTES // row)
        for start in range(0, len(target), step):
            rows = min(step, len(target) - start)
            f.seek(chunk.start + (first[0] + start) * row)
            content = bytearray(rows * row)
            if f.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise OSError(f"ends before byte {f.tell() + len(content)}")
            part = torch.frombuffer(content, dtype=dtype).view(rows, *size[1:])
            for dim in range(1, target.dim()):
                part = part.narrow(dim, first[dim], target.shape[dim])
            target[start : start + rows].copy_(part)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
