"""The sections of process group, sharding and communication."""

import dataclasses
from typing import Literal

from c2al.typed import Problems

Sharding = Literal[
    "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"
]
Kernel = Literal["fused", "fused_uvm_caching"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Sharding constraints of one embedding table."""

    name: str
    """Name of the table: `table` of its sparse features, or the feature's own name."""
    sharding: tuple[Sharding, ...] = ()
    """Types the planner may choose from; empty: dist.sharding."""
    min_partition: int = 0
    """Smallest column shard of column-wise types; 0: the planner's."""
    kernels: tuple[Kernel, ...] = ()
    """Kernels the planner may choose from; empty: dist.kernels."""
    cache_load_factor: float = 0.0
    """Share of the rows that a GPU caches of this table in host memory; 0: dist.cache_load_factor."""

    def problems(self) -> Problems:
        if not 0 <= self.cache_load_factor < 1:
            yield "cache_load_factor", f"must be in [0, 1), is {self.cache_load_factor}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Process group, sharding and communication."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    sharding: tuple[Sharding, ...] = ("table_wise", "row_wise")
    """Types the planner may choose from for every table not named in `tables`. data_parallel
    tables are trained by row-wise Adagrad outside the fused kernel."""
    kernels: tuple[Kernel, ...] = ("fused",)
    """Where GPUs may keep every table not named in `tables`: in device memory (fused), or in host memory with the rows
    in use cached on the device (fused_uvm_caching). Given both, the planner takes host memory where the other is
    short. On CPUs every table is in host memory."""
    cache_load_factor: float = 0.2
    """Share of the rows of a fused_uvm_caching table that its device caches."""
    tables: tuple[TableConfig, ...] = ()
    """Constraints of single tables, one `[[dist.tables]]` each."""
    plan: str = ""
    """JSON plan file, as a run saves it; replaces the planner."""
    local_world_size: int = 0
    """Ranks per host in the planner's topology; 0: as launched."""
    hbm_gib: float = 0.0
    """Device memory per rank in the planner's topology, in GiB; 0: the device's."""
    ddr_gib: float = 8.0
    """Host memory per rank for tables in the planner's topology, in GiB."""
    within_host_gib_s: float = 0.0
    """Bandwidth between ranks of one host in the planner's topology, in GiB/s; 0: 600 between GPUs, 1 between CPUs."""
    between_hosts_gib_s: float = 0.0
    """Bandwidth of one rank's network link in the planner's topology, in GiB/s; 0: 12.5 for GPUs, 1 for CPUs."""
    forward_comm: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Type in which pooled embeddings travel between ranks."""
    backward_comm: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Type in which their gradients travel between ranks."""
    timeout_seconds: float = 600.0
    """Longest wait of a collective, in seconds, before the run ends with an error."""

    def problems(self) -> Problems:
        if not self.sharding:
            yield "sharding", "must name at least one type"
        if not self.kernels:
            yield "kernels", "must name at least one kernel"
        if not 0 < self.cache_load_factor < 1:
            yield "cache_load_factor", f"must be in (0, 1), is {self.cache_load_factor}"
        if self.timeout_seconds <= 0:
            yield "timeout_seconds", f"must be positive, is {self.timeout_seconds}"
        for field in ("hbm_gib", "ddr_gib", "local_world_size", "within_host_gib_s", "between_hosts_gib_s"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"
        names = [t.name for t in self.tables]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "tables", f"table '{name}' is named twice"
