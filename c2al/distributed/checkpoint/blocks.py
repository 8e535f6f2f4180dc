"""Planners of torch.distributed.checkpoint for tensors given as blocks.

DCP cuts and joins blocks when a tensor is saved under one layout and loaded under another. It takes
layouts from ShardedTensor and DTensor, which cannot express the moments of a column-wise table. Here
a state is a plain mapping from key to the blocks that this rank writes or wants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from c2al.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """A block of a larger tensor: its live or staged values, where it starts, and the whole size."""

    tensor: torch.Tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> "Piece":
        return cls(tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.tensor.shape)


State = Mapping[str, Sequence[Piece]]


class BlockSaver(SavePlanner):
    """Writes exactly the pieces each rank lists; together they must tile every tensor once."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._pieces: dict[MetadataIndex, Piece] = {
            MetadataIndex(key, p.offset): p for key, pieces in state_dict.items() for p in pieces
        }

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=piece.chunk,
                        properties=TensorProperties.create_from_tensor(piece.tensor),
                        size=torch.Size(piece.size),
                    ),
                )
                for index, piece in self._pieces.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        return piece.tensor.detach()


class BlockLoader(LoadPlanner):
    """Fills every piece of the state from whatever saved blocks overlap it.

    Raises CheckpointError when a tensor is not there, has another size, or its saved blocks do not
    cover a piece exactly once.
    """

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._state: State = state_dict
        self._saved = metadata.state_dict_metadata
        self._pieces: dict[tuple[str, tuple[int, ...]], Piece] = {
            (key, p.offset): p for key, pieces in state_dict.items() for p in pieces
        }

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, pieces in self._state.items():
            saved = self._saved.get(key)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"'{key}' is not in the checkpoint")
            if any(tuple(saved.size) != p.size for p in pieces):
                raise CheckpointError(f"'{key}' is stored as {list(saved.size)}, wanted as {list(pieces[0].size)}")
            reads = create_read_items_for_chunk_list(key, saved, [p.chunk for p in pieces])
            wanted, found = sum(p.tensor.numel() for p in pieces), sum(r.lengths.numel() for r in reads)
            if wanted != found:
                raise CheckpointError(f"'{key}': {found} of {wanted} wanted values are in the checkpoint")
            items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a state of blocks holds no bytes")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.offset is not None
        target = self._pieces[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].tensor.detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The values were copied into the live tensor that `resolve_tensor` gave."""
