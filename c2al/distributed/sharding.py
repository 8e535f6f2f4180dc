"""Embedding tables over ranks: which table lies where, and what it holds before the first step.

R rows of a table, D columns (embedding dimension).

A plan is a `Placement` a table: a sharding type and the ranks its blocks go to, from which every
block's rows and columns follow. The planner chooses placements; a plan file gives them; both take
the same path from there. A table's initial weights are a function of (seed, table, row), never of
the plan or of the number of ranks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.tbe.config.optimizer_config import WeightDecayMode
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag, BatchedFusedEmbeddingBag
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad

from c2al.config import Config, DistConfig
from c2al.distributed.process import World
from c2al.errors import PlanError
from c2al.files import write_atomically

GIB = 2**30
INIT_ROWS = 8192
"""Rows of a table that are drawn from one generator; part of what a seed means, never to be changed."""

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
COLUMN_SPLIT = (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value)
GRID = ShardingType.GRID_SHARD.value
ROW_SPLIT = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, GRID)


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
    """Sharding type of one table and the rank of each of its blocks.

    table_wise [r]; column_wise and table_column_wise one rank a column block; row_wise all ranks in
    order; table_row_wise the ranks of one host; grid_shard the ranks of one host for each column
    block, one after the other; data_parallel none (every rank holds the whole table).
    """

    sharding: str
    ranks: tuple[int, ...]

    def extents(self, rows: int, dim: int, local_size: int) -> list["Extent"]:
        """Where every block of a rows x dim table lies. Row blocks are ceil(rows / n) long, the last
        ones shorter or empty, as TorchRec wants them."""
        columns = 1
        if self.sharding in COLUMN_SPLIT:
            columns = len(self.ranks)
        elif self.sharding == GRID:
            columns = len(self.ranks) // local_size
        per_column = len(self.ranks) // columns
        width, height = dim // columns, -(-rows // max(per_column, 1))
        extents = []
        for i, rank in enumerate(self.ranks):
            column, part = divmod(i, per_column)
            row = min(part * height, rows)
            extents.append(Extent(rank, row, column * width, min(height, rows - row), width))
        return extents

    def problem(self, rows: int, dim: int, world: World) -> str | None:
        """Why this placement cannot hold a rows x dim table in `world`; None when it can."""
        ranks, n, local = self.ranks, len(self.ranks), world.local_size
        hosts = [list(range(h * local, (h + 1) * local)) for h in range(world.size // local)]
        if any(not 0 <= r < world.size for r in ranks):
            return f"ranks {list(ranks)} are not all in [0, {world.size})"
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


Plan = Mapping[str, Placement]
"""Table name -> placement."""


def shard_model(model: nn.Module, config: Config, world: World) -> DistributedModelParallel:
    """Distributes a model that was built identically on every rank.

    Tables are placed by `config.dist` (planner or plan file), trained by the row-wise Adagrad fused
    into their backward, and initialised from `config.seed`; what the unsharded module held in its
    tables is not kept, so build it on the meta device. Everything else stays as built and is
    replicated (DDP).

    Raises PlanError, with one message on every rank, when no plan fits, a plan file does not suit
    the model and the ranks, a table is weighted, or a quantized communication is asked for that
    this stack would silently replace.
    """
    tables = _tables(model)

    def choose() -> Plan:
        plan = _read_plan(Path(config.dist.plan)) if config.dist.plan else _choose(model, config, world)
        _validate(plan, tables, config, world)
        return plan

    plan = world.once(choose)
    optimizer = config.train.optimizer
    for _, ebc in _collections(model):
        _apply_optimizer_in_backward(
            RowWiseAdagrad,
            ebc.parameters(),
            {
                "lr": optimizer.sparse_lr,
                "eps": optimizer.sparse_eps,
                "weight_decay": optimizer.sparse_weight_decay,
                "weight_decay_mode": WeightDecayMode.L2,
            },
        )
    dmp = DistributedModelParallel(
        model,
        device=world.device,
        plan=_torchrec_plan(model, plan, world),
        sharders=[_Sharder(qcomm_codecs_registry=_codecs(config.dist, world.device))],
    )
    _initialise(dmp, tables, config.seed)
    return dmp


def plan_of(dmp: DistributedModelParallel) -> dict[str, Placement]:
    """The plan a sharded model follows."""
    return {
        table: Placement(
            sharding.sharding_type, () if sharding.sharding_type == DATA_PARALLEL else tuple(sharding.ranks or ())
        )
        for module in dmp.plan.plan.values()
        for table, sharding in module.items()
    }


def save_plan(dmp: DistributedModelParallel, path: Path) -> None:
    """Writes the plan as JSON that `dist.plan` accepts."""
    tables = {name: {"sharding": p.sharding, "ranks": list(p.ranks)} for name, p in plan_of(dmp).items()}
    write_atomically(path, json.dumps({"tables": tables}, indent=1) + "\n")


def plan_table(dmp: DistributedModelParallel) -> str:
    """The plan as text: a line a table (type, kernel, blocks, ranks, bytes of weights and moments) and the
    bytes of each rank."""
    sizes = {t.name: (t.num_embeddings, t.embedding_dim) for t in _configs(dmp)}
    plan, size, local_size = plan_of(dmp), torch.distributed.get_world_size(), get_local_size()
    load = [0] * size
    lines = [("table", "rows x dim", "sharding", "kernel", "ranks", "bytes")]
    for name, chosen in plan.items():
        rows, dim = sizes[name]
        total = 0
        for block in chosen.extents(rows, dim, local_size):
            stored = _bytes(block.rows, block.columns)
            load[block.rank] += stored
            total += stored
        if chosen.sharding == DATA_PARALLEL:
            total = _bytes(rows, dim) * size
            load = [b + _bytes(rows, dim) for b in load]
        kernel = "dense" if chosen.sharding == DATA_PARALLEL else "fused"
        ranks = "all" if chosen.sharding == DATA_PARALLEL else ",".join(map(str, chosen.ranks))
        lines.append((name, f"{rows} x {dim}", chosen.sharding, kernel, ranks, f"{total:,}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"rank {rank}: {stored:,} bytes" for rank, stored in enumerate(load)]
    return "\n".join(text)


@dataclass(frozen=True)
class Block:
    """Part of a table on this rank: rows from `row`, columns from `column`. The tensors are live views."""

    row: int
    column: int
    weight_RD: torch.Tensor
    moment_R: torch.Tensor | None
    """Row-wise Adagrad sum of the fused kernel, over this block's columns; None for data_parallel."""
    parameter: torch.Tensor | None
    """data_parallel: the flat parameter `weight_RD` is a part of, whose gradient DDP averages."""

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
    """Every table of the model, in the same order on every rank, with the blocks this rank holds."""
    plan = plan_of(dmp)
    tables = []
    for path, sharded in dmp.module.named_modules():
        if not isinstance(sharded, ShardedEmbeddingBagCollection):
            continue
        blocks: dict[str, list[Block]] = {}
        for lookup in sharded._lookups:  # not registered as submodules, so modules() does not reach them
            for kernel in lookup.modules():
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


class _Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Offers every sharding type on CPU too, where the stock list leaves out those that split rows,
    and no kernel but the fused one (dense for data_parallel)."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [DATA_PARALLEL, ShardingType.TABLE_WISE.value, *COLUMN_SPLIT, *ROW_SPLIT]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [_kernel(sharding_type)]


class _Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """The stock enumerator walks Python sets of strings, whose order changes from run to run; equally
    rated plans would then differ between two runs of one config."""

    def enumerate(self, *args: Any, **kwargs: Any) -> list[ShardingOption]:
        options = super().enumerate(*args, **kwargs)
        order = {name: i for i, name in enumerate(dict.fromkeys(o.fqn for o in options))}
        return sorted(options, key=lambda o: (order[o.fqn], o.sharding_type, o.num_shards))


def _choose(model: nn.Module, config: Config, world: World) -> Plan:
    """Lets TorchRec's planner place every table within the constraints of the config."""
    if not _tables(model):
        return {}
    special = {t.name: t for t in config.dist.tables}
    features = {f.key: f for f in config.data.sparse}
    constraints = {}
    for table, embedding in _tables(model).items():
        wanted = special.get(table)
        kinds = list(wanted.sharding if wanted and wanted.sharding else config.dist.sharding)
        if embedding.pooling is PoolingType.MEAN and len(kinds) > 1:
            kinds = [k for k in kinds if k != GRID]  # see _validate
        constraints[table] = ParameterConstraints(
            sharding_types=kinds,
            compute_kernels=sorted({_kernel(k) for k in kinds}),
            min_partition=(wanted.min_partition or None) if wanted else None,
            pooling_factors=[float(max(1, features[table].max_length))] if table in features else [1.0],
        )
    cuda = world.device.type == "cuda"
    hbm = config.dist.hbm_gib * GIB
    topology = Topology(
        world_size=world.size,
        local_world_size=world.local_size,
        compute_device=world.device.type,
        hbm_cap=int(hbm or torch.cuda.get_device_properties(world.device).total_memory) if cuda else None,
        ddr_cap=int(config.dist.ddr_gib * GIB),
    )
    batch_size = max(1, config.train.batch_size // world.size)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=_Enumerator(topology=topology, batch_size=batch_size, constraints=constraints),
        # Share of device memory left to the dense part and the activations.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        debug=False,
    )
    try:
        torchrec_plan = planner.plan(model, [_Sharder()])
    except PlannerError as e:
        asked = sorted({k for c in constraints.values() for k in c.sharding_types or ()})
        raise PlanError(
            f"no sharding plan fits {world.size} ranks with dist.ddr_gib = {config.dist.ddr_gib:g}, "
            f"dist.hbm_gib = {config.dist.hbm_gib:g} and sharding types {asked}: {' '.join(str(e).split())}"
        ) from e
    except RuntimeError as e:  # the enumerator's answer to constraints that exclude everything
        raise PlanError(f"dist.sharding: {e}") from e
    return {
        table: Placement(s.sharding_type, () if s.sharding_type == DATA_PARALLEL else tuple(s.ranks))
        for module in torchrec_plan.plan.values()
        for table, s in module.items()
    }


def _read_plan(path: Path) -> Plan:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): Placement(str(entry["sharding"]), tuple(int(r) for r in entry["ranks"]))
            for name, entry in tree["tables"].items()
        }
    except OSError as e:
        raise PlanError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise PlanError(
            f'{path}: not a plan file, which is {{"tables": {{NAME: {{"sharding": TYPE, "ranks": [...]}}}}}}: {e!r}'
        ) from e


def _validate(plan: Plan, tables: Mapping[str, EmbeddingBagConfig], config: Config, world: World) -> None:
    """Raises PlanError naming every table that the plan does not suit."""
    source = config.dist.plan or "the planner"
    problems = [f"table '{name}' is in the plan, not in the model" for name in plan.keys() - tables.keys()]
    problems += [f"table '{name}' is in the model, not in the plan" for name in tables.keys() - plan.keys()]
    for name in tables.keys() & plan.keys():
        problem = plan[name].problem(tables[name].num_embeddings, tables[name].embedding_dim, world)
        if problem:
            problems.append(f"table '{name}': {problem}")
        if plan[name].sharding == GRID and tables[name].pooling is PoolingType.MEAN:
            # TorchRec pools row blocks by sum and divides later, but forgets to for grid_shard.
            problems.append(f"table '{name}': grid_shard would silently pool by sum instead of mean")
    cpu, comms = world.device.type == "cpu", {config.dist.forward_comm, config.dist.backward_comm}
    if cpu and "bf16" in comms:
        problems.append("bf16 communication would silently become fp16 on CPU; ask for fp16 or fp32")
    if cpu and "int8" in comms:
        for name in sorted(n for n, p in plan.items() if p.sharding in ROW_SPLIT):
            problems.append(f"table '{name}': int8 communication does not work with {plan[name].sharding} on CPU")
    if cpu and config.train.optimizer.sparse_weight_decay:
        for name in sorted(n for n, p in plan.items() if p.sharding != DATA_PARALLEL):
            problems.append(
                f"table '{name}': the fused CPU kernel silently ignores train.optimizer.sparse_weight_decay"
            )
    if problems:
        raise PlanError("\n".join(f"{source}: {p}" for p in sorted(problems)))


def _torchrec_plan(model: nn.Module, plan: Plan, world: World) -> ShardingPlan:
    modules = {}
    for path, ebc in _collections(model):
        shardings = EmbeddingModuleShardingPlan()
        for table in ebc.embedding_bag_configs():
            chosen = plan[table.name]
            blocks = [
                ShardMetadata(
                    shard_offsets=[e.row, e.column],
                    shard_sizes=[e.rows, e.columns],
                    placement=placement(world.device.type, e.rank, world.local_size),
                )
                for e in chosen.extents(table.num_embeddings, table.embedding_dim, world.local_size)
            ]
            parallel = chosen.sharding == DATA_PARALLEL
            shardings[table.name] = ParameterSharding(
                sharding_type=chosen.sharding,
                compute_kernel=_kernel(chosen.sharding),
                ranks=list(range(world.size)) if parallel else list(chosen.ranks),
                sharding_spec=None if parallel else EnumerableShardingSpec(blocks),
                # An id outside its table is silently read as another row unless the check is fatal.
                bounds_check_mode=None if parallel else BoundsCheckMode.FATAL,
            )
        modules[path] = shardings
    return ShardingPlan(modules)


def _codecs(config: DistConfig, device: torch.device) -> dict[str, Any] | None:
    return get_qcomm_codecs_registry(  # type: ignore[no-any-return]
        QCommsConfig(
            forward_precision=CommType(config.forward_comm), backward_precision=CommType(config.backward_comm)
        ),
        device=device,
    )


@torch.no_grad()
def _initialise(dmp: DistributedModelParallel, tables: Mapping[str, EmbeddingBagConfig], seed: int) -> None:
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
                values_RD.uniform_(low, high, generator=generator)
                first, last = max(start, block.row), min(start + len(values_RD), block.row + height)
                block.weight_RD[first - block.row : last - block.row].copy_(
                    values_RD[first - start : last - start, block.column : block.column + width]
                )


def _collections(model: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)]
    for path, ebc in found:
        if ebc.is_weighted():
            # It would accept a batch without weights and pool with garbage.
            raise PlanError(f"{path}: a weighted EmbeddingBagCollection is not supported; batches carry no id weights")
    return found


def _tables(model: nn.Module) -> dict[str, EmbeddingBagConfig]:
    return {t.name: t for _, ebc in _collections(model) for t in ebc.embedding_bag_configs()}


def _configs(dmp: DistributedModelParallel) -> Sequence[EmbeddingBagConfig]:
    return [
        t
        for m in dmp.module.modules()
        if isinstance(m, ShardedEmbeddingBagCollection)
        for t in m._embedding_bag_configs
    ]


def _kernel(sharding_type: str) -> str:
    dense = sharding_type == DATA_PARALLEL
    return str((EmbeddingComputeKernel.DENSE if dense else EmbeddingComputeKernel.FUSED).value)


def _bytes(rows: int, dim: int) -> int:
    """float32 weights and one float32 moment a row."""
    return 4 * rows * (dim + 1)
