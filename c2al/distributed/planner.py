"""Choosing a plan with TorchRec's planner."""

from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.modules.embedding_configs import PoolingType

from c2al.config import CACHED, Config
from c2al.distributed.placement import (
    COLUMN_SPLIT,
    DATA_PARALLEL,
    DENSE,
    FUSED,
    GRID,
    ROW_SPLIT,
    Plan,
    Ranks,
    cache_params,
    placement_of,
)
from c2al.distributed.tables import tables_of
from c2al.errors import PlanError

GIB = 2**30
LINKS_GIB_S = {"cuda": (600.0, 12.5), "cpu": (1.0, 1.0)}
"""GiB/s of a rank within its host and between hosts. Of GPUs TorchRec's own figures; of CPUs what gloo brings over
loopback (docs/LOG.md), which a network of 10 Gb/s is like. At a GPU's figures splitting rows would seem free there."""


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Offers every sharding type on CPU too, and the kernels that a `Placement` may name.

    The stock list for CPU leaves out the types that split rows. The stock list for GPUs has kernels that keep a
    table in host memory without a cache.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [DATA_PARALLEL, ShardingType.TABLE_WISE.value, *COLUMN_SPLIT, *ROW_SPLIT]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == DATA_PARALLEL:
            return [DENSE]
        return [FUSED, CACHED] if compute_device_type == "cuda" else [FUSED]


class _Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """Lists the options in an order that does not depend on the process.

    The stock enumerator walks Python sets of strings, whose order changes from process to process. Two
    runs of one config would then choose different ones of equally rated plans.
    """

    def enumerate(self, *args: Any, **kwargs: Any) -> list[ShardingOption]:
        options = super().enumerate(*args, **kwargs)
        order = {name: i for i, name in enumerate(dict.fromkeys(o.fqn for o in options))}
        return sorted(options, key=lambda o: (order[o.fqn], o.sharding_type, o.num_shards))


class _StorageEstimator(EmbeddingStorageEstimator):  # type: ignore[misc]
    """Counts what TorchRec leaves out of a cache on a device: moments of rows that are not cached, 4 bytes each, and
    locks of those that are, 4 bytes each."""

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        super().estimate(sharding_options, *args, **kwargs)
        for option in sharding_options:
            if option.compute_kernel == CACHED:
                for shard in option.shards:
                    shard.storage.hbm += 4 * shard.size[0]


def choose_plan(model: nn.Module, config: Config, world: Ranks) -> Plan:
    """Lets TorchRec's planner place every table within the constraints of the config.

    The tables must know their optimizer, or its moments are not counted.

    Raises PlanError when nothing fits, or when no GPU is here whose memory `dist.hbm_gib = 0` stands for.
    """
    if not tables_of(model):
        return {}
    constraints = _constraints(model, config, world)
    topology = _topology(config, world)
    batch_size = max(1, config.train.batch_size // world.size)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        enumerator=_Enumerator(
            topology=topology,
            batch_size=batch_size,
            constraints=constraints,
            estimator=[
                EmbeddingPerfEstimator(topology=topology, constraints=constraints),
                _StorageEstimator(topology=topology, constraints=constraints),
            ],
        ),
        # Share of device memory left to the dense part and the activations.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        debug=False,
    )
    try:
        torchrec_plan = planner.plan(model, [Sharder()])
    except PlannerError as e:
        asked = sorted({k for c in constraints.values() for k in c.sharding_types or ()})
        offered = sorted({k for c in constraints.values() for k in c.compute_kernels or () if k != DENSE})
        hint = ""
        if world.device.type == "cuda" and CACHED not in offered:
            hint = f"dist.kernels = ['fused', '{CACHED}'] lets tables lie in host memory. "
        raise PlanError(
            f"no sharding plan fits {world.size} ranks with dist.ddr_gib = {config.dist.ddr_gib:g}, "
            f"dist.hbm_gib = {config.dist.hbm_gib:g}, sharding types {asked} and kernels {offered}. {hint}"
            f"TorchRec says: {' '.join(str(e).split())}"
        ) from e
    except RuntimeError as e:  # the enumerator's answer to constraints that exclude everything
        raise PlanError(f"dist.sharding: {e}") from e
    return {table: placement_of(s) for module in torchrec_plan.plan.values() for table, s in module.items()}


def _constraints(model: nn.Module, config: Config, world: Ranks) -> dict[str, ParameterConstraints]:
    """What the config lets the planner choose from, for every table."""
    special = {t.name: t for t in config.dist.tables}
    features = {f.key: f for f in config.data.sparse}
    constraints = {}
    for table, embedding in tables_of(model).items():
        wanted = special.get(table)
        kinds = list(wanted.sharding if wanted and wanted.sharding else config.dist.sharding)
        if embedding.pooling is PoolingType.MEAN and len(kinds) > 1:
            kinds = [k for k in kinds if k != GRID]  # see _validate
        if world.size == 1 and "table_wise" in kinds:
            # Rated alike by the planner, but rows that are split among one rank are sorted into its one bucket.
            kinds = [k for k in kinds if k not in ROW_SPLIT]
        kernels = (wanted and wanted.kernels) or config.dist.kernels
        constraints[table] = ParameterConstraints(
            sharding_types=kinds,
            compute_kernels=[DENSE, *(kernels if world.device.type == "cuda" else [FUSED])],
            # Rated without the prefetch: with it the planner takes host memory to be as fast as the device's.
            cache_params=cache_params((wanted and wanted.cache_load_factor) or config.dist.cache_load_factor, False),
            min_partition=(wanted.min_partition or None) if wanted else None,
            # Of each feature that shares the table.
            pooling_factors=[
                float(max(features[f].max_length, 1)) if f in features else 1.0 for f in embedding.feature_names
            ],
        )
    return constraints


def _topology(config: Config, world: Ranks) -> Topology:
    cuda, hbm = world.device.type == "cuda", config.dist.hbm_gib * GIB
    if cuda and not hbm and not torch.cuda.is_available():
        raise PlanError("dist.hbm_gib: must be set to plan for GPUs where none is to be asked")
    within, between = LINKS_GIB_S[world.device.type]
    return Topology(
        world_size=world.size,
        local_world_size=world.local_size,
        compute_device=world.device.type,
        hbm_cap=int(hbm or torch.cuda.get_device_properties(world.device).total_memory) if cuda else None,
        ddr_cap=int(config.dist.ddr_gib * GIB),
        intra_host_bw=(config.dist.within_host_gib_s or within) * GIB / 1e3,  # bytes per millisecond
        inter_host_bw=(config.dist.between_hosts_gib_s or between) * GIB / 1e3,
    )
