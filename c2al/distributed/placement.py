"""Plans: which blocks an embedding table is split into and the rank that holds each.

A plan is a `Placement` per table: a sharding type and the ranks its blocks go to, from which every
block's rows and columns follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ParameterSharding

from c2al.config import CACHED
from c2al.errors import PlanError
from c2al.state import read_state, write_state

PLAN_VERSION = 1

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
COLUMN_SPLIT = (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value)
GRID = ShardingType.GRID_SHARD.value
ROW_SPLIT = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, GRID)

DENSE, FUSED = str(EmbeddingComputeKernel.DENSE.value), str(EmbeddingComputeKernel.FUSED.value)
"""Kernels that train a table: of data_parallel; in device memory."""


class Ranks(Protocol):
    """How many ranks there are and on what: a `World`, or a `Cluster` that is only planned for."""

    @property
    def size(self) -> int: ...

    @property
    def local_size(self) -> int:
        """Ranks per host."""

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Cluster:
    """Ranks that need not be there."""

    size: int
    local_size: int
    device: torch.device


@dataclass(frozen=True)
class Extent:
    """Rank and place of one block of a table."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Placement:
    """Sharding type of one table, the rank of each of its blocks, and the memory it is in.

    The ranks of each type:
        table_wise                       the one rank that holds the table
        column_wise, table_column_wise   one rank per column block
        row_wise                         all ranks in order
        table_row_wise                   the ranks of one host
        grid_shard                       per column block the ranks of one host
        data_parallel                    none, since every rank holds the whole table
    """

    sharding: str
    ranks: tuple[int, ...]
    cache_load_factor: float = 0.0
    """Share of a block's rows that its GPU caches, the whole block being in host memory; 0: all in device memory."""

    @property
    def kernel(self) -> str:
        """TorchRec's name of the kernel that trains the table."""
        if self.sharding == DATA_PARALLEL:
            return DENSE
        return CACHED if self.cache_load_factor else FUSED

    def column_blocks(self, local_size: int) -> int:
        """How many blocks the columns are split into."""
        if self.sharding in COLUMN_SPLIT:
            return len(self.ranks)
        return len(self.ranks) // local_size if self.sharding == GRID else 1

    def extents(self, rows: int, dim: int, local_size: int) -> list["Extent"]:
        """Where every block of a rows x dim table lies.

        As TorchRec wants them, row blocks are ceil(rows / n) long, and the last ones shorter or empty.
        """
        columns = self.column_blocks(local_size)
        per_column = len(self.ranks) // columns
        width, height = dim // columns, -(-rows // max(per_column, 1))
        extents = []
        for i, rank in enumerate(self.ranks):
            column, part = divmod(i, per_column)
            row = min(part * height, rows)
            extents.append(Extent(rank, row, column * width, min(height, rows - row), width))
        return extents

    def problem(self, rows: int, dim: int, world: Ranks) -> str | None:
        """Why this placement cannot hold a rows x dim table in `world`; None when it can."""
        ranks, n, local = self.ranks, len(self.ranks), world.local_size
        hosts = [list(range(h * local, (h + 1) * local)) for h in range(world.size // local)]
        if any(not 0 <= r < world.size for r in ranks):
            return f"ranks {list(ranks)} are not all in [0, {world.size})"
        if not 0 <= self.cache_load_factor < 1:
            return f"cache_load_factor must be in [0, 1), is {self.cache_load_factor}"
        if self.cache_load_factor and self.sharding == DATA_PARALLEL:
            return "data_parallel has no cache_load_factor"
        if self.cache_load_factor and world.device.type == "cpu":
            return "cache_load_factor is of tables that GPUs train"
        match self.sharding:
            case "data_parallel":
                return None if not ranks else "data_parallel takes no ranks"
            case "table_wise":
                return None if n == 1 else f"table_wise takes one rank, has {list(ranks)}"
            case "row_wise":
                every = list(range(world.size))
                return None if list(ranks) == every else f"row_wise takes the ranks {every}, has {list(ranks)}"
            case "table_row_wise":
                return None if list(ranks) in hosts else f"table_row_wise takes the ranks of one host of {hosts}"
            case "column_wise" | "table_column_wise":
                if not n or dim % n or (dim // n) % 4:
                    return f"{n} column blocks of {dim} columns are not equal multiples of 4 wide"
                if self.sharding == "table_column_wise" and not any(set(ranks) <= set(h) for h in hosts):
                    return f"table_column_wise takes ranks of one host of {hosts}, has {list(ranks)}"
                return None
            case "grid_shard":
                parts = [list(ranks[i : i + local]) for i in range(0, n, local)]
                if not parts or any(p not in hosts for p in parts):
                    return f"grid_shard takes whole hosts of {hosts}, has {parts}"
                if dim % len(parts) or (dim // len(parts)) % 4:
                    return f"{len(parts)} column blocks of {dim} columns are not equal multiples of 4 wide"
                return None
        return f"unknown sharding type '{self.sharding}'"


def placement_of(sharding: ParameterSharding) -> Placement:
    """TorchRec's own words for where a table is, in ours."""
    kind, cached = sharding.sharding_type, sharding.compute_kernel == CACHED
    ranks = () if kind == DATA_PARALLEL else tuple(sharding.ranks or ())
    return Placement(kind, ranks, sharding.cache_params.load_factor if cached else 0.0)


def cache_params(load_factor: float, prefetch: bool) -> CacheParams:
    """Of a table in host memory. Rows leave the cache by age, as the prefetch pipeline demands.

    `prefetch`: a batch ahead, the pipeline fills the cache and locks the rows until their update.
    """
    return CacheParams(algorithm=CacheAlgorithm.LRU, load_factor=load_factor, prefetch_pipeline=prefetch)


Plan = Mapping[str, Placement]
"""Table name -> placement."""


def plan_arithmetic(plan: Plan, local_size: int) -> dict[str, int]:
    """Table -> number of column blocks: all of a plan that changes what a training run computes.

    Row-wise Adagrad keeps one moment per row and column block. Which rank holds a block, and how the
    rows are split, changes nothing but the order of sums.
    """
    return {table: placement.column_blocks(local_size) for table, placement in plan.items()}


@dataclass(frozen=True)
class _PlanFile:
    tables: dict[str, Placement]


def write_plan(plan: Plan, path: Path) -> None:
    """Writes the plan file that `dist.plan` names."""
    write_state(path, _PlanFile(dict(plan)), format="plan", version=PLAN_VERSION)


def read_plan(path: Path) -> Plan:
    """Raises PlanError, naming the file and the field, when it is no plan file."""
    return read_state(path, _PlanFile, format="plan", version=PLAN_VERSION, error=PlanError).tables
