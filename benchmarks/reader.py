"""How fast are Parquet rows turned into batches, beside a bare scan, and does memory grow with the rows?

    python benchmarks/reader.py --rows 1e6 4e6

Writes impressions with 8 dense and 20 single-valued sparse columns (16 integers, 4 strings; zstd,
row groups of 64k rows), then runs each contender in a process of its own, --repeats times in turn:

scan         bare pyarrow read of the same columns, row group by row group, one thread
encode       decode and encode every row group, one thread: what one reader thread does
reader       a shuffled epoch through BatchReader, batches of 4096, one worker thread
unshuffled   the same in file order

rows/s is by CPU time (user + system) of the whole process's work, so that other processes on the
machine do not count; wall says what it took here. Peak memory is the process's, less what it was
after the imports. Medians go to benchmarks/results/reader.csv, one line a contender, appended.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.encode import Encoder
from c2al.data.parquet import BatchReader
from c2al.data.source import open_dataset
from c2al.data.statistics import Moments, Statistics

ROW_GROUP = 65536
BATCH = 4096
CONTENDERS = ("scan", "encode", "reader", "unshuffled")
RESULTS = Path(__file__).parent / "results" / "reader.csv"
DATA = DataConfig(
    dense=tuple(DenseFeature(column=f"d{i}", transforms=("log1p", "standardise"), null=0.0) for i in range(8)),
    sparse=tuple(SparseFeature(column=f"s{i}", num_embeddings=1_000_000) for i in range(20)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output.is_dir():
        parser.error(f"--output: {args.output} is a folder, a file to append to is wanted")
    if args.only:
        print(json.dumps(measure(args.only, args.folder)))
        return
    print(f"{'rows':>10} {'contender':<11}{'rows/s of CPU':>14}{'x scan':>8}{'wall s':>8}{'peak MiB':>10}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), rows)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for _ in range(args.repeats):
                for name in CONTENDERS:
                    words = [sys.executable, __file__, "--only", name, "--folder", folder]
                    runs[name].append(json.loads(subprocess.check_output(words, text=True, stderr=subprocess.DEVNULL)))
        for name in CONTENDERS:
            medians = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
            ratio = statistics.median(
                run["cpu"] / scan["cpu"] for run, scan in zip(runs[name], runs["scan"], strict=True)
            )
            speed = rows / medians["cpu"]
            print(
                f"{rows:>10,} {name:<11}{speed:>14,.0f}{ratio:>8.2f}{medians['wall']:>8.2f}{medians['peak_mib']:>10.0f}"
            )
            record(
                args.output,
                rows,
                name,
                round(speed),
                round(ratio, 3),
                round(medians["wall"], 3),
                round(medians["peak_mib"]),
            )


def write(folder: Path, rows: int) -> None:
    words = pa.array([f"value-{i:06d}" for i in range(100_000)])
    with pq.ParquetWriter(folder / "a.parquet", impressions(0, 1, words).schema, compression="zstd") as writer:
        for start in range(0, rows, ROW_GROUP):
            writer.write_table(impressions(start, min(ROW_GROUP, rows - start), words), row_group_size=ROW_GROUP)


def impressions(start: int, rows: int, words: pa.Array) -> pa.Table:
    rng = np.random.default_rng(start)
    columns = {"label": (rng.random(rows) < 0.2).astype(np.int8)}
    columns |= {f"d{i}": rng.lognormal(size=rows).astype(np.float32) for i in range(8)}
    columns |= {f"s{i}": rng.zipf(1.2, size=rows) % 10_000_000 for i in range(16)}
    columns |= {f"s{i}": words.take(pa.array(rng.zipf(1.2, size=rows) % len(words))) for i in range(16, 20)}
    return pa.table(columns)


def measure(name: str, folder: str) -> dict[str, float]:
    paths = (folder,)
    fitted = Statistics(moments={f.column: Moments(0.5, 1.0) for f in DATA.dense}, vocabularies={})
    before, cpu, wall = peak_mib(), cpu_seconds(), time.perf_counter()
    for _ in work(name, paths, fitted):
        pass
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "peak_mib": peak_mib() - before}


def work(name: str, paths: tuple[str], fitted: Statistics) -> Iterator[object]:
    encoder = Encoder(DATA, fitted, (), ())
    if name in ("reader", "unshuffled"):
        yield from BatchReader(paths, DATA, fitted, **reader_options(shuffle=name == "reader"))
        return
    for file in open_dataset(paths):
        for group in range(len(file.row_group_rows)):
            table = file.read(group, encoder.columns, encoder.dictionary)
            yield encoder.encode(table, file.where(group)) if name == "encode" else table


def reader_options(shuffle: bool) -> dict[str, int | bool]:
    return {"batch_size": BATCH, "rank": 0, "world_size": 1, "seed": 0, "shuffle": shuffle, "shards": 8}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def record(path: Path, rows: int, name: str, speed: int, ratio: float, wall: float, peak: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    versions = " ".join(f"{p} {importlib.metadata.version(p)}" for p in ("pyarrow", "numpy", "torch", "torchrec"))
    machine = f"{platform.machine()} {os.cpu_count()} CPUs"
    with path.open("a", newline="") as f:
        out = csv.writer(f)
        if new:
            out.writerow(
                [
                    "date",
                    "machine",
                    "versions",
                    "rows",
                    "contender",
                    "rows_per_cpu_second",
                    "x_scan",
                    "wall_s",
                    "peak_mib",
                ]
            )
        out.writerow([datetime.date.today(), machine, versions, rows, name, speed, ratio, wall, peak])


if __name__ == "__main__":
    main()
