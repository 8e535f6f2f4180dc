"""Distributes a model's embedding tables over the ranks.

The planner chooses a plan or a plan file gives it; both take the same path from there. A table's
initial weights are a function of (seed, table, row), never of the plan or of the number of ranks.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.tbe.config.optimizer_config import WeightDecayMode
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim import RowWiseAdagrad

from c2al.config import Config, DistConfig, OptimizerConfig
from c2al.distributed.exchange import bytes_sent
from c2al.distributed.placement import (
    DATA_PARALLEL,
    GRID,
    ROW_SPLIT,
    Extent,
    Plan,
    Ranks,
    cache_params,
    read_plan,
    write_plan,
)
from c2al.distributed.planner import Sharder, choose_plan
from c2al.distributed.process import World, hush_the_stack
from c2al.distributed.table_update import update_on_host
from c2al.distributed.tables import collections_of, initialise, plan_of, sharded_configs, tables_of
from c2al.errors import PlanError
from c2al.text import table as text_table

FEW_RANKS = 16
"""Ranks of which each has a line in a plan's text."""


def shard_model(
    model: nn.Module, config: Config, world: World, *, for_training: bool = True
) -> DistributedModelParallel:
    """Distributes a model that was built identically on every rank.

    Tables are placed by `config.dist` (planner or plan file), trained by the row-wise Adagrad fused
    into their backward, and initialised from `config.seed`. The weights that the unsharded module had
    in its tables are lost, so build it on the meta device. Everything else stays as built and is
    replicated (DDP, where there is more than one process).

    `for_training = False` is for readers of a trained model, whose predictions no placement changes. A plan file
    that does not suit this world is then replaced by the planner's, and a line on stderr says so. Caches of tables
    in host memory are then filled as rows are asked for: rows that are prefetched wait for a backward pass.

    Raises PlanError, with one message on every rank, when no plan fits, a plan file does not suit
    the model and the ranks, a weighted table pools by mean, or a quantized communication is asked for that
    this stack would silently replace.
    """
    tables = tables_of(model)
    _update_in_backward(model, config.train.optimizer)
    plan = world.once(lambda: _plan(model, config, world, plan_again=not for_training))
    dmp = DistributedModelParallel(
        model,
        device=world.device,
        plan=_torchrec_plan(model, plan, world, for_training),
        sharders=[Sharder(qcomm_codecs_registry=_codecs(config.dist, world.device))],
        # DDP would copy every gradient for nobody, and cut a compiled model in two.
        init_data_parallel=not world.alone_on_cpu,
    )
    _correct_mean_pooling(dmp, plan)
    normal = {f.table_name: f.init_scale for f in config.data.sparse if f.init == "normal"}
    initialise(dmp, tables, config.seed, normal)
    if world.device.type == "cpu":
        update_on_host(dmp)
    return dmp


def _plan(model: nn.Module, config: Config, ranks: Ranks, plan_again: bool = False) -> Plan:
    """The plan file's plan, or the planner's. `plan_again`: also where the plan file does not suit the ranks."""
    tables = tables_of(model)
    if config.dist.plan:
        try:
            plan = read_plan(Path(config.dist.plan))
            _validate(plan, config.dist.plan, tables, config, ranks)
            return plan
        except PlanError as e:
            if not plan_again:
                raise
            print(f"dist.plan is not followed, planning again for {ranks.size} ranks: {e}", file=sys.stderr)
    plan = choose_plan(model, config, ranks)
    _validate(plan, "the planner", tables, config, ranks)
    return plan


def _update_in_backward(model: nn.Module, optimizer: OptimizerConfig) -> None:
    """Has the backward pass of every table update it by row-wise Adagrad."""
    for _, ebc in collections_of(model):
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


def _correct_mean_pooling(dmp: DistributedModelParallel, plan: Plan) -> None:
    """Makes TorchRec divide by the lengths of the bags only where it has pooled a mean as a sum.

    It pools a table split by rows by sum, and divides afterwards when the table pools by mean. Where a
    collection has such a table, TorchRec also divides the features of every table that is not split by rows:
    a sum becomes a mean, and a mean is divided twice.
    """
    for module in dmp.module.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            module._pooling_type_to_rs_features[PoolingType.SUM.value] = [
                feature
                for table in module._embedding_bag_configs
                if table.pooling is PoolingType.SUM or plan[table.name].sharding not in ROW_SPLIT
                for feature in table.feature_names
            ]


def save_plan(dmp: DistributedModelParallel, path: Path) -> None:
    """Writes the plan as JSON that `dist.plan` accepts."""
    write_plan(plan_of(dmp), path)


def plan_table(dmp: DistributedModelParallel) -> str:
    """The plan as text: one line per table, then the bytes of each rank.

    A table's line has its type, kernel, ranks, and the bytes of its weights and moments on all ranks.
    """
    sizes = {t.name: (t.num_embeddings, t.embedding_dim) for t in sharded_configs(dmp)}
    return _plan_text(plan_of(dmp), sizes, torch.distributed.get_world_size(), get_local_size())


def planned(model: nn.Module, config: Config, ranks: Ranks) -> tuple[Plan, str]:
    """The plan for ranks that need not be there, and its text with what leaves each rank in a step.

    Raises PlanError when none fits or the plan does not suit the config.
    """
    hush_the_stack()
    tables = tables_of(model)
    _update_in_backward(model, config.train.optimizer)
    plan = _plan(model, config, ranks)
    sizes = {name: (t.num_embeddings, t.embedding_dim) for name, t in tables.items()}
    element = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[config.dist.forward_comm]
    batch = max(1, config.train.batch_size // ranks.size)
    sent_N2 = bytes_sent(plan, tables, ranks, batch, element)
    lines = [
        f"pooled embeddings sent {where} per forward pass of {batch:,} rows per rank: "
        f"mean {sent_N.mean():,.0f} bytes, most {sent_N.max():,.0f} (rank {sent_N.argmax()})"
        for where, sent_N in zip(("within a host", "over the network"), sent_N2.T, strict=True)
    ]
    return plan, "\n".join([_plan_text(plan, sizes, ranks.size, ranks.local_size), *lines])


def _plan_text(plan: Plan, sizes: Mapping[str, tuple[int, int]], size: int, local_size: int) -> str:
    load, host = [0] * size, [0] * size
    lines = [("table", "rows x dim", "sharding", "kernel", "ranks", "bytes")]
    for name, chosen in plan.items():
        rows, dim = sizes[name]
        total = 0
        for block in chosen.extents(rows, dim, local_size):
            total += _bytes(block.rows, block.columns)
            on_device, on_host = _held(block, chosen.cache_load_factor)
            load[block.rank] += on_device
            host[block.rank] += on_host
        if chosen.sharding == DATA_PARALLEL:
            total = _bytes(rows, dim) * size
            load = [b + _bytes(rows, dim) for b in load]
        every = chosen.sharding == DATA_PARALLEL or (size > FEW_RANKS and len(chosen.ranks) == size)
        ranks = "all" if every else ",".join(map(str, chosen.ranks))
        lines.append((name, f"{rows} x {dim}", chosen.sharding, chosen.kernel, ranks, f"{total:,}"))
    loads = [_loads_text(load, "bytes")]
    if any(host):
        loads = [_loads_text(load, "bytes of device memory"), _loads_text(host, "bytes of host memory")]
    return "\n".join([text_table(lines, left=5), *loads])


def _loads_text(load: Sequence[int], unit: str) -> str:
    """A line per rank; of many ranks the least and the most."""
    if len(load) <= FEW_RANKS:
        return "\n".join(f"rank {rank}: {stored:,} {unit}" for rank, stored in enumerate(load))
    most = max(range(len(load)), key=load.__getitem__)
    return f"{len(load)} ranks: {min(load):,} to {load[most]:,} {unit} (rank {most})"


def _validate(plan: Plan, source: str, tables: Mapping[str, EmbeddingBagConfig], config: Config, world: Ranks) -> None:
    """Raises PlanError, with `source` in front, naming every table that the plan does not suit."""
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


def _torchrec_plan(model: nn.Module, plan: Plan, world: World, prefetch: bool) -> ShardingPlan:
    modules = {}
    for path, ebc in collections_of(model):
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
                compute_kernel=chosen.kernel,
                cache_params=cache_params(chosen.cache_load_factor, prefetch) if chosen.cache_load_factor else None,
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


def _bytes(rows: int, dim: int) -> int:
    """float32 weights and one float32 moment a row."""
    return 4 * rows * (dim + 1)


def _held(block: Extent, load_factor: float) -> tuple[int, int]:
    """Bytes of a block in the memory of the device that trains it, and of its host where the device has a cache.

    The moments stay on the device. A cache is managed by 4 bytes per row of the table and 20 per row that it holds.
    """
    if not load_factor:
        return _bytes(block.rows, block.columns), 0
    cached = int(block.rows * load_factor)
    return cached * (4 * block.columns + 20) + block.rows * (4 + 4), 4 * block.rows * block.columns
