"""Row-wise Adagrad of embedding tables in host memory, in place of fbgemm's CPU kernel.

V ids of a batch, R rows of all tables of a kernel, N distinct rows of the batch, D columns.

fbgemm sorts the ids of every table, transposes them and gathers the gradient of a row from there. One pass
that adds each gradient to its row's sum, in the order of the batch, needs none of that (docs/LOG.md has
both times). What it computes is the same to the last bit: float32 sums of a row's gradients in batch
order, float64 for the sum of their squares, float32 moments and weights.
"""

from typing import Any

import numba
import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.compiled import compiled
from c2al.distributed.tables import fused_kernels

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Features = NDArray[np.int64]
"""(F, 4): see `_row_wise_adagrad`."""


class HostTables:
    """Forward of one fbgemm kernel whose tables lie in host memory: fbgemm's lookup, our update in backward.

    Weights, moments, learning rate and checks of the ids stay fbgemm's, so sharding, checkpoints and
    schedules know nothing of it. It stands in for the kernel's own `forward`.
    """

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        self._kernel = kernel
        self._slot_R = np.full(int(kernel.total_hash_size), -1, np.int32)
        """Where a row's gradient is summed in the batch at work; -1: the batch has not named it. 4 bytes per row."""
        columns = kernel.D_offsets.numpy().astype(np.int64)
        self._features = np.stack(
            (
                kernel.weights_offsets.numpy().astype(np.int64),
                kernel.hash_size_cumsum.numpy().astype(np.int64)[:-1],
                columns[:-1],
                np.diff(columns),
            ),
            axis=1,
        )

    def __call__(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """(B, sum of D): as SplitTableBatchedEmbeddingBagsCodegen.forward."""
        if per_sample_weights is not None:  # Weighted bags: fbgemm scales the gradients, and updates by its own kernel.
            weighted: Tensor = SplitTableBatchedEmbeddingBagsCodegen.forward(
                self._kernel, indices, offsets, per_sample_weights
            )
            return weighted
        placeholder = self._kernel.placeholder_autograd_tensor
        out: Tensor = _Lookup.apply(placeholder, self, indices, offsets)  # type: ignore[no-untyped-call]
        return out

    def lookup(self, indices: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = SplitTableBatchedEmbeddingBagsCodegen.forward(self._kernel, indices, offsets)
        return out

    def update(self, grad_BD: Tensor, indices: Tensor, offsets: Tensor) -> None:
        k = self._kernel
        _row_wise_adagrad(
            k.weights_host.detach().numpy(),
            k.momentum1_host.detach().numpy(),
            self._slot_R,
            grad_BD.contiguous().numpy(),
            indices.numpy(),
            offsets.numpy(),
            self._features,
            k.pooling_mode == PoolingMode.MEAN,
            np.float32(k.get_learning_rate()),
            np.float32(k.optimizer_args.eps),
        )


def update_on_host(dmp: DistributedModelParallel) -> None:
    """Has the fused tables of a model on the CPU updated by `HostTables`, however they are sharded.

    Kernels with a table that several features read keep fbgemm's update: there the gradients of a row must
    meet before its update, over all features that read it.
    """
    for kernel in fused_kernels(dmp):
        if not _shares_a_table(kernel):
            kernel.forward = HostTables(kernel)


def _shares_a_table(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    return len(set(kernel.feature_table_map)) != len(kernel.feature_table_map)


class _Lookup(torch.autograd.Function):
    """Gives no gradient: the tables are updated when one arrives."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, tables: HostTables, indices: Tensor, offsets: Tensor) -> Tensor:
        ctx.tables = tables
        ctx.save_for_backward(indices, offsets)
        return tables.lookup(indices, offsets)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[None, None, None, None]:
        ctx.tables.update(grad_BD, *ctx.saved_tensors)
        return None, None, None, None


@intrinsic  # type: ignore[untyped-decorator]
def _fused_multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""

    def code(context: Any, builder: Any, signature: Any, operands: Any) -> Any:
        return builder.fma(*operands)

    return numba.float32(numba.float32, numba.float32, numba.float32), code


@compiled(error_model="numpy")
def _sum_of_squares(values_D: Floats, lane_8: Floats) -> np.float32:
    """In eight sums side by side, then added as a processor adds neighbours: fbgemm's order. D is a multiple of 4."""
    lane_8[:] = np.float32(0.0)
    whole = len(values_D) // 8 * 8
    for d in range(0, whole, 8):
        for j in range(8):
            lane_8[j] += values_D[d + j] * values_D[d + j]
    for j in range(len(values_D) - whole):
        lane_8[j] += values_D[whole + j] * values_D[whole + j]
    low = (lane_8[0] + lane_8[1]) + (lane_8[2] + lane_8[3])
    return np.float32(low + ((lane_8[4] + lane_8[5]) + (lane_8[6] + lane_8[7])))


@compiled(error_model="numpy")
def _row_wise_adagrad(
    weight: Floats,
    moment_R: Floats,
    slot_R: NDArray[np.int32],
    grad_BD: Floats,
    indices_V: Ints,
    offsets: Ints,
    features: Features,
    mean: bool,
    rate: np.float32,
    eps: np.float32,
) -> None:
    """One update of every table by the gradients of a batch.

    weight and moment_R hold all tables one after another; row f of `features` says of a feature
    where its weights, its rows and its columns of grad_BD begin, and how many columns it has.
    """
    batch = len(grad_BD)
    lane_8 = np.empty(8, np.float32)
    one = np.float32(1.0)
    for f in range(len(features)):
        first_weight, first_row, first_column, columns = features[f]
        start, stop = offsets[f * batch], offsets[(f + 1) * batch]
        row_N = np.empty(stop - start, np.int64)
        sum_ND = np.empty((stop - start, columns), np.float32)
        found = 0
        for sample in range(batch):
            a, b = offsets[f * batch + sample], offsets[f * batch + sample + 1]
            grad_D = grad_BD[sample][first_column : first_column + columns]
            scale = one / np.float32(b - a) if mean and b > a else one
            for v in range(a, b):
                row = first_row + indices_V[v]
                slot = slot_R[row]
                if slot < 0:
                    slot_R[row] = found
                    row_N[found] = row
                    sum_D = sum_ND[found]
                    for d in range(columns):
                        sum_D[d] = scale * grad_D[d]
                    found += 1
                else:
                    sum_D = sum_ND[slot]
                    for d in range(columns):
                        sum_D[d] = _fused_multiply_add(scale, grad_D[d], sum_D[d])
        for n in range(found):
            row = row_N[n]
            slot_R[row] = -1
            moment = moment_R[row] + _sum_of_squares(sum_ND[n], lane_8) / np.float32(columns)
            moment_R[row] = moment
            step = rate / (np.sqrt(moment) + eps)
            at = first_weight + (row - first_row) * columns
            weight_D, sum_D = weight[at : at + columns], sum_ND[n]
            for d in range(columns):
                weight_D[d] -= step * sum_D[d]
