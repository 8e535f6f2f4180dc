"""The unit of training: B rows of one rank as tensors. B counts padding, which is always last."""

import dataclasses
from collections.abc import Sequence

import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from c2al.config import DataConfig
from c2al.data.rows import Floats, Rows, jagged_inputs, own_and_weighted, padded


@dataclasses.dataclass
class Batch(Pipelineable):  # type: ignore[misc]  # torchrec is untyped
    """One rank's share of a global batch."""

    dense_BF: torch.Tensor
    """float32, transformed dense features in config order."""
    sparse: KeyedJaggedTensor
    """int64 embedding rows of the features whose table has no weights, keys in config order, int32 lengths."""
    label_B: torch.Tensor
    """float32, 0 or 1."""
    weight_B: torch.Tensor
    """float32; positive, or 0 for a padding row."""
    member_BC: torch.Tensor
    """float32, 1 where the row is in the cohort, one column per chosen cohort; C = 0 where none were given."""
    rows: int
    """Real rows of the whole global batch, over all ranks."""
    carried: pa.Table | None
    """Columns carried along, of this rank's real rows only; stays on the host."""
    weighted: KeyedJaggedTensor | None = None
    """The same of the features whose table has weights, with the float32 weight of each value; None: there are none."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return dataclasses.replace(
            self,
            dense_BF=self.dense_BF.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            weighted=None if self.weighted is None else self.weighted.to(device, non_blocking=non_blocking),
            label_B=self.label_B.to(device, non_blocking=non_blocking),
            weight_B=self.weight_B.to(device, non_blocking=non_blocking),
            member_BC=self.member_BC.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.dense_BF, self.sparse, self.weighted, self.label_B, self.weight_B, self.member_BC):
            if part is not None:
                part.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return dataclasses.replace(
            self,
            dense_BF=self.dense_BF.pin_memory(),
            sparse=self.sparse.pin_memory(),
            weighted=None if self.weighted is None else self.weighted.pin_memory(),
            label_B=self.label_B.pin_memory(),
            weight_B=self.weight_B.pin_memory(),
            member_BC=self.member_BC.pin_memory(),
        )


def collate(parts: Sequence[Rows], data: DataConfig, size: int, rows: int) -> Batch:
    """All rows of `parts` in order, padded to B = size with rows of weight 0 and empty bags.

    `rows` is what Batch.rows says. The tensors own their memory.
    """
    real = sum(len(p) for p in parts)
    own, weighted = own_and_weighted(data)
    tables = [p.carried for p in parts if p.carried is not None]
    return Batch(
        dense_BF=_padded([p.dense_NF for p in parts], real, size),
        sparse=_jagged(parts, data, own, size),
        weighted=_jagged(parts, data, weighted, size, True) if weighted else None,
        label_B=_padded([p.label_N for p in parts], real, size),
        weight_B=_padded([p.weight_N for p in parts], real, size),
        member_BC=_padded([p.member_NC for p in parts], real, size),
        rows=rows,
        carried=pa.concat_tables(tables) if tables else None,
    )


def _jagged(
    parts: Sequence[Rows], data: DataConfig, features: Sequence[int], size: int, weighted: bool = False
) -> KeyedJaggedTensor:
    """The sparse features at these positions of the config, of all rows, and their weights where asked for."""
    values, lengths, *weights = map(torch.from_numpy, jagged_inputs(parts, features, size, weighted))
    return KeyedJaggedTensor(
        keys=[data.sparse[i].key for i in features],
        values=values,
        lengths=lengths,
        weights=weights[0] if weighted else None,
        stride=size,
    )


def _padded(parts: Sequence[Floats], real: int, size: int) -> torch.Tensor:
    return torch.from_numpy(padded(parts, real, size))
