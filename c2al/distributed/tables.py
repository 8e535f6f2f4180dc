"""The embedding tables of a model: their configs before sharding, and what a rank holds of them after.

R rows of a table, D columns (embedding dimension).
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag, BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from c2al.distributed.placement import DATA_PARALLEL, Placement, placement_of
from c2al.errors import PlanError

INIT_ROWS = 8192
"""Rows of a table that are drawn from one generator. Another number would draw other weights from a seed."""


@dataclass(frozen=True)
class Block:
    """Part of a table on this rank, from row `row` and column `column` on. The tensors are live views."""

    row: int
    column: int
    weight_RD: torch.Tensor
    moment_R: torch.Tensor | None
    """Row-wise Adagrad sums of the fused kernel, one per row, over this block's columns. None for
    data_parallel, whose sums the `Optimizer` keeps."""
    parameter: torch.Tensor | None
    """For data_parallel, the flat parameter that `weight_RD` is a view of; DDP averages its gradient."""

    @property
    def grad_RD(self) -> torch.Tensor | None:
        """Gradient of a data_parallel block after backward."""
        if self.parameter is None or self.parameter.grad is None:
            return None
        start = self.weight_RD.storage_offset() - self.parameter.storage_offset()
        return self.parameter.grad.flatten()[start : start + self.weight_RD.numel()].view_as(self.weight_RD)


@dataclass(frozen=True)
class Table:
    """One embedding table as this rank holds it."""

    name: str
    """Name of its weight in the model's state_dict."""
    rows: int
    dim: int
    replicated: bool
    blocks: tuple[Block, ...]


def local_tables(dmp: DistributedModelParallel) -> list[Table]:
    """Every table of the model, in the same order on every rank, with the blocks this rank holds.

    Rows that a GPU caches of a table in host memory are written back first; what is cached later is not in the
    blocks. Who writes into blocks calls `drop_caches` afterwards.
    """
    _write_back(dmp)
    plan = plan_of(dmp)
    tables = []
    for path, sharded in dmp.module.named_modules():
        if not isinstance(sharded, ShardedEmbeddingBagCollection):
            continue
        blocks: dict[str, list[Block]] = {}
        for kernel in _kernels(sharded):
            for name, block in _kernel_blocks(kernel):
                blocks.setdefault(name, []).append(block)
        for config in sharded._embedding_bag_configs:
            tables.append(
                Table(
                    name=f"{path}.embedding_bags.{config.name}.weight"
                    if path
                    else f"embedding_bags.{config.name}.weight",
                    rows=config.num_embeddings,
                    dim=config.embedding_dim,
                    replicated=plan[config.name].sharding == DATA_PARALLEL,
                    blocks=tuple(sorted(blocks.get(config.name, []), key=lambda b: (b.row, b.column))),
                )
            )
    return tables


def fused_kernels(dmp: DistributedModelParallel) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """The kernels of fbgemm that train this rank's blocks."""
    for sharded in dmp.module.modules():
        if isinstance(sharded, ShardedEmbeddingBagCollection):
            for kernel in _kernels(sharded):
                if isinstance(kernel, BatchedFusedEmbeddingBag):
                    yield kernel.emb_module


def drop_caches(dmp: DistributedModelParallel) -> None:
    """Empties the caches of tables in host memory, after weights were written there. No batch may be under way."""
    for kernel in _cached(dmp):
        kernel.reset_cache_states()
        if kernel.prefetch_pipeline:
            kernel.lxu_cache_locking_counter.zero_()


@contextlib.contextmanager
def without_locks(dmp: DistributedModelParallel) -> Iterator[None]:
    """For forward passes that no backward pass follows, between the batches of a prefetch pipeline.

    A row that is cached for a batch is locked until its update. Without one it would never leave the cache again.
    """
    kernels = list(_cached(dmp))
    locked = [kernel.lock_cache_line for kernel in kernels]
    for kernel in kernels:
        kernel.lock_cache_line = False
    try:
        yield
    finally:
        for kernel, lock in zip(kernels, locked, strict=True):
            kernel.lock_cache_line = lock


def _write_back(dmp: DistributedModelParallel) -> None:
    kernels = list(_cached(dmp))
    if kernels:
        torch.cuda.synchronize()  # A prefetch of the next batch would move rows under the copy.
    for kernel in kernels:
        kernel.flush()


def _cached(dmp: DistributedModelParallel) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    return (kernel for kernel in fused_kernels(dmp) if kernel.lxu_cache_weights.numel())


def _kernels(sharded: ShardedEmbeddingBagCollection) -> Iterator[nn.Module]:
    for lookup in sharded._lookups:  # not registered as submodules, so modules() does not reach them
        yield from lookup.modules()


def _kernel_blocks(kernel: nn.Module) -> Iterator[tuple[str, Block]]:
    if isinstance(kernel, BatchedFusedEmbeddingBag):
        tbe = kernel.emb_module
        moments = tbe.get_optimizer_state()
        for config, weight_RD, moment in zip(
            kernel.config.embedding_tables, tbe.split_embedding_weights(), moments, strict=True
        ):
            row, column = config.local_metadata.shard_offsets
            if weight_RD.numel():
                yield config.name, Block(row, column, weight_RD.detach(), moment["sum"], None)
    elif isinstance(kernel, BatchedDenseEmbeddingBag):
        flat = kernel.emb_module.weights
        for config, weight_RD in zip(
            kernel.config.embedding_tables, kernel.emb_module.split_embedding_weights(), strict=True
        ):
            yield config.name, Block(0, 0, weight_RD.detach(), None, flat)


def plan_of(dmp: DistributedModelParallel) -> dict[str, Placement]:
    """The plan a sharded model follows."""
    return {table: placement_of(s) for module in dmp.plan.plan.values() for table, s in module.items()}


@torch.no_grad()
def initialise(
    dmp: DistributedModelParallel,
    tables: Mapping[str, EmbeddingBagConfig],
    seed: int,
    normal: Mapping[str, float] | None = None,
) -> None:
    """Draws the weights of every local block.

    They are uniform between the bounds of the table's config, or, of a table that `normal` names, normal
    with mean 0 and that standard deviation. A weight is a function of (seed, table, row, column), whatever
    the plan.
    """
    for table in local_tables(dmp):
        name = table.name.split(".")[-2]
        low, high = tables[name].get_weight_init_min(), tables[name].get_weight_init_max()
        for block in table.blocks:
            height, width = block.weight_RD.shape
            for chunk in range(block.row // INIT_ROWS, -(-(block.row + height) // INIT_ROWS)):
                start = chunk * INIT_ROWS
                digest = hashlib.sha256(f"c2al table {seed}/{name}/{chunk}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                values_RD = torch.empty(min(INIT_ROWS, table.rows - start), table.dim)
                if normal and name in normal:
                    values_RD.normal_(0.0, normal[name], generator=generator)
                else:
                    values_RD.uniform_(low, high, generator=generator)
                first, last = max(start, block.row), min(start + len(values_RD), block.row + height)
                block.weight_RD[first - block.row : last - block.row].copy_(
                    values_RD[first - start : last - start, block.column : block.column + width]
                )
    drop_caches(dmp)


def collections_of(model: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    """Path and module of every embedding bag collection before sharding.

    Raises PlanError for a weighted one with a table that pools by mean, whose weights would be ignored.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)]
    for path, ebc in found:
        for table in ebc.embedding_bag_configs() if ebc.is_weighted() else ():
            if table.pooling is not PoolingType.SUM:
                raise PlanError(f"{path}: table '{table.name}' has weights, which go with pooling by sum only")
    return found


def tables_of(model: nn.Module) -> dict[str, EmbeddingBagConfig]:
    """Config of every table by name, before sharding."""
    return {t.name: t for _, ebc in collections_of(model) for t in ebc.embedding_bag_configs()}


def sharded_configs(dmp: DistributedModelParallel) -> Sequence[EmbeddingBagConfig]:
    """Config of every table of a sharded model."""
    return [
        t
        for m in dmp.module.modules()
        if isinstance(m, ShardedEmbeddingBagCollection)
        for t in m._embedding_bag_configs
    ]
