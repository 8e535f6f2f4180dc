"""What one hour on 8, 64 and 256 GPUs would do, from measured parts and stated bandwidths.

    python benchmarks/cluster.py [--page docs/scale.md]

Nothing here runs on a cluster. The step of one GPU is measured, tables are placed by the product's planner for
ranks that are not there, and bytes over bandwidths give the rest. --page replaces the tables in that page.

Letters: N GPUs, L per host, B rows per GPU and step, P dense parameters.

    exchange  = 2 max(bytes within the host / NVLINK, bytes over the network / NETWORK), of the busiest rank:
                pooled embeddings forward, their gradients backward, neither hidden behind other work
    allreduce = 2 * 4 P (N - 1) / N / NVLINK or, over several hosts, 2 * 4 P / L / NETWORK, the longer: DDP hides
                it behind the backward pass while it is shorter
    samples/s = N B / (step + exchange)
"""

import argparse
import csv
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from made_rows import write
from shapes import dhen_production

from c2al.config import Config, replace
from c2al.distributed.exchange import bytes_sent
from c2al.distributed.placement import Cluster, Plan
from c2al.distributed.sharding import planned
from c2al.distributed.tables import tables_of
from c2al.training.describe import describe
from c2al.training.model import C2ALModel

NVLINK, NETWORK, STORE = 450e9, 50e9, 3.1e9
"""Bytes per second: each direction of a GPU's NVLink; its share of a 400 Gb/s network; an object store to a host."""
PER_HOST, HBM_GIB = 8, 80.0
GPUS = (8, 64, 256)
READER_COLUMNS = 28
"""Of benchmarks/reader.py."""
BEGIN, END = "<!-- benchmarks/cluster.py -->", "<!-- end -->"


def _last(file: str, **wanted: str) -> Mapping[str, str]:
    """The newest line of a table under results/ that has these values."""
    with (RESULTS / file).open() as f:
        return [row for row in csv.DictReader(f) if wanted.items() <= row.items()][-1]


GPU = _last(
    "gpu_step_cuda.csv",
    shape="dhen-production", precision="bfloat16", ops="fm", mode="graphs", arm="c2al",
)  # fmt: skip
"""A whole training step on one GPU: C2AL, compiled, under CUDA graphs, with torch's attention among fields: no step
with our own has been timed under CUDA graphs at this shape."""
STEP_MS = float(GPU["median_ms"])


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one step on the busiest of N GPUs."""

    step: float
    exchange: float
    allreduce: float
    busiest: float
    """Bytes of the busiest rank over the mean."""

    def samples_per_second(self, gpus: int, batch: int) -> float:
        return gpus * batch / (self.step + self.exchange)


def cost(sent_N2: Any, dense_parameters: int, gpus: int, step: float, per_host: int = PER_HOST) -> Cost:
    """The formulas of this file. sent_N2: bytes of a forward pass per rank, within the host and over the network."""
    exchange = 2 * max(sent_N2[:, 0].max() / NVLINK, sent_N2[:, 1].max() / NETWORK)
    inside = 2 * 4 * dense_parameters * (gpus - 1) / gpus / NVLINK
    outside = 2 * 4 * dense_parameters / per_host / NETWORK if gpus > per_host else 0.0
    total_N = sent_N2.sum(axis=1)
    return Cost(step, float(exchange), max(inside, outside), float(total_N.max() / total_N.mean()))


def plans(config: Config, gpus: int) -> Iterator[tuple[str, Plan, Any]]:
    """The planner's plan of whole tables, and of tables cut into blocks of 16 columns."""
    split = [{"name": n, "sharding": ["column_wise"], "min_partition": 16} for n in config.data.tables]
    for name, tables in (("tables whole", []), ("columns split", split)):
        changes = {"dist.tables": tables, "dist.hbm_gib": HBM_GIB, "train.batch_size": config.train.batch_size * gpus}
        model = C2ALModel(config)
        ranks = Cluster(gpus, min(gpus, PER_HOST), torch.device("cuda"))
        plan, _ = planned(model, replace(config, **changes), ranks)
        yield name, plan, (tables_of(model), ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--step-ms", type=float, default=STEP_MS)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    args = parser.parse_args()
    config = dhen_production().config
    text = "\n\n".join([_exchange(config, args.gpus, args.step_ms), _feeding(config, args.step_ms)])
    print(text)
    if args.page:
        before, _, rest = args.page.read_text(encoding="utf-8").partition(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _exchange(config: Config, counts: Any, step_ms: float) -> str:
    dense = sum(layer.parameters for layer in describe(config, 2).layers)
    batch = config.train.batch_size
    rows: list[tuple[object, ...]] = [
        ("GPUs", "plan", "travels as", "busiest / mean", "exchange ms", "all-reduce ms", "step ms",
         "million samples/s", "billion in an hour", "of N single GPUs"),
    ]  # fmt: skip
    for gpus in counts:
        for name, plan, (tables, ranks) in plans(config, gpus):
            for kind, element in (("fp32", 4), ("fp16", 2)):
                c = cost(bytes_sent(plan, tables, ranks, batch, element), dense, gpus, step_ms / 1e3)
                speed = c.samples_per_second(gpus, batch)
                ms = [f"{1e3 * s:.2f}" for s in (c.exchange, c.allreduce, c.step + c.exchange)]
                share = c.step / (c.step + c.exchange)
                rows.append(
                    (
                        gpus,
                        name,
                        kind,
                        f"{c.busiest:.1f}",
                        *ms,
                        f"{speed / 1e6:.1f}",
                        f"{speed * 3.6e-6:.1f}",
                        f"{share:.0%}",
                    )
                )
    return _markdown(rows)


def _feeding(config: Config, step_ms: float) -> str:
    """What readers and the object store must bring, and discovery afterwards."""
    columns = len(config.data.dense) + len(config.data.sparse)
    with tempfile.TemporaryDirectory() as folder:
        write(config.data, 65_536, Path(folder) / "rows")
        bytes_per_row = sum(f.stat().st_size for f in Path(folder).rglob("*.parquet")) / 65_536
    reader = _last("reader.csv", contender="reader", rows="10000000")
    per_core = float(reader["rows_per_cpu_second"]) * READER_COLUMNS / columns
    job = _last("discovery.csv", contender="job", rows="1000000000")
    per_gpu = config.train.batch_size / (step_ms / 1e3)
    need = PER_HOST * per_gpu * bytes_per_row
    return _markdown(
        [
            ("part", "value"),
            ("whole training step, ms", step_ms),
            ("card", GPU["machine"]),
            ("its copy bandwidth, TB/s", f"{float(GPU['limit_gb_per_second']) / 1e3:.2f}"),
            ("samples/s of one GPU", f"{per_gpu:,.0f}"),
            (f"reader, rows/s of one core, {columns} columns", f"{per_core:,.0f}"),
            ("reader cores per GPU", f"{per_gpu / per_core:.1f}"),
            ("Parquet (zstd), bytes per row", f"{bytes_per_row:,.0f}"),
            ("object store, GB/s per host of 8 GPUs", f"{need / 1e9:.2f} of {STORE / 1e9:.1f}"),
            ("discovery, core-seconds per billion rows", f"{float(job['ns_cpu_a_row']):.0f}"),
            (
                "table rows that fit one GPU (dim 64, Adagrad)",
                f"{0.85 * HBM_GIB * 2**30 / (4 * 65) / 1e6:,.0f} million",
            ),
        ]
    )


def _markdown(rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
