"""The sections of process group, sharding and communication."""

import dataclasses
from typing import Literal

from c2al.typed import Problems

Sharding = Literal[
    "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"
]
Kernel = Literal["fused", "fused_uvm_caching"]
CACHED = "fused_uvm_caching"
"""The kernel of tables in host memory behind a cache on the device, as TorchRec names it."""
MOST_GIB = 1e9
"""Beyond it and its inverse the planner's arithmetic breaks down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Sharding constraints of one embedding table."""

    name: str
    """Name of the table: `table` of its sparse features, or the feature's own name."""
    sharding: tuple[Sharding, ...] = ()
    """Types the planner may choose from; empty: dist.sharding."""
    min_partition: int = 0
    """Fewest columns of a shard of column-wise types, at least 4; 0: the planner's."""
    kernels: tuple[Kernel, ...] = ()
    """Kernels the planner may choose from; empty: dist.kernels."""
    cache_load_factor: float = 0.0
    """Share of its rows by which this table in host memory enlarges a GPU's cache; 0: dist.cache_load_factor. Tables
    of one GPU and dimension share one cache."""

    def problems(self) -> Problems:
        if self.min_partition and self.min_partition < 4:
            yield "min_partition", f"must be 0 or at least 4, is {self.min_partition}"
        if not 0 <= self.cache_load_factor < 1:
            yield "cache_load_factor", f"must be in [0, 1), is {self.cache_load_factor}"
        if set(self.sharding) == {"data_parallel"} and (self.kernels or self.cache_load_factor):
            yield "kernels", f"table '{self.name}' is data_parallel, which is on every device and has no such choice"
        elif self.cache_load_factor and self.kernels and CACHED not in self.kernels:
            yield "cache_load_factor", f"table '{self.name}' has no cache: its kernels do not name {CACHED}"


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
        replicated = set(self.sharding) == {"data_parallel"}
        if replicated and CACHED in self.kernels:
            yield "kernels", f"data_parallel tables, which dist.sharding asks for, are not kept by {CACHED}"
        for i, table in enumerate(self.tables):
            if table.cache_load_factor and not table.kernels and CACHED not in self.kernels:
                problem = f"table '{table.name}' has no cache: dist.kernels does not name {CACHED}"
                yield f"tables[{i}].cache_load_factor", problem
            if replicated and not table.sharding and (table.kernels or table.cache_load_factor):
                problem = f"table '{table.name}' is data_parallel, as dist.sharding says, and has no such choice"
                yield f"tables[{i}].kernels", problem
        if self.timeout_seconds <= 0:
            yield "timeout_seconds", f"must be positive, is {self.timeout_seconds}"
        for field in ("hbm_gib", "ddr_gib", "local_world_size", "within_host_gib_s", "between_hosts_gib_s"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"
        for field in ("hbm_gib", "ddr_gib", "within_host_gib_s", "between_hosts_gib_s"):
            if (value := getattr(self, field)) > MOST_GIB or 0 < value < 1 / MOST_GIB:
                yield field, f"must be 0 or in [{1 / MOST_GIB:g}, {MOST_GIB:g}], is {value:g}"
        names = [t.name for t in self.tables]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "tables", f"table '{name}' is named twice"
