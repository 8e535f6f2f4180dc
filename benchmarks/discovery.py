"""What does discovery cost beside reading the data, and does its memory grow with the rows?

    python benchmarks/discovery.py --rows 64e6
    python benchmarks/discovery.py --rows 1e9 --only scan_user,job

Writes impressions (zstd, row groups of 1M rows; files are kept in --folder and reused), then runs each
contender in a process of its own, one thread, --repeats times in turn:

scan         bare pyarrow read of the columns that counting needs; scan_user: and of the user
count        the product's main pass, cuts given: three axes and their cross, 105 cohorts
jackknife    the same with 32 jackknife groups by user
duckdb       the same counts by GROUPING SETS
polars       the cross's counts by streaming group_by (marginals are sums of it)
job          all of `c2al discover`: start, two passes for percentile cuts, main pass, statistics, files

CPU is user + system time around the work itself (for job: of the process), after compiling; the ratio
is to the bare scan of the same columns in the same round, the median over rounds. Medians and peak
memory go to benchmarks/results/discovery.csv, one line per contender, appended.
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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1_000_000
FILE_ROWS = 8 * ROW_GROUP
COUNTED = ["prediction", "label", "surface", "age", "activity"]
BASE = {"count": "scan", "jackknife": "scan_user", "duckdb": "scan", "polars": "scan", "job": "scan_user"}
CONTENDERS = ["scan", "scan_user", *(c for c in BASE)]
RESULTS = Path(__file__).parent / "results" / "discovery.csv"
CONFIG = """
data.user_id = "user_id"
data.dense = [{column = "activity"}]
discover.jackknife = %s
axes = [
    {name = "surface", column = "surface"},
    {name = "age", column = "age"},
    {name = "activity", column = "activity", kind = "percentiles", percentiles = [0, 25, 75, 100]},
    {name = "all", kind = "cross", cross = ["surface", "age", "activity"]},
]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=64e6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=CONTENDERS, help="contenders, by commas")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "c2al_discovery_benchmark")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    files = [args.folder / f"part-{i:05d}.parquet" for i in range(-(-int(args.rows) // FILE_ROWS))]
    if args.worker == "write":
        for seed, file in enumerate(files):
            if not file.exists():
                write(file, seed)
        return
    if args.worker:
        work(args.worker, [str(f) for f in files])
        return
    subprocess.run(worker("write", args), check=True)  # apart: a child's peak memory starts at its parent's
    rows = len(files) * FILE_ROWS
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for _ in range(args.repeats):
        for name in args.only:
            runs[name].append(measure(name, args))
    report(runs, rows)


def write(file: Path, seed: int) -> None:
    """One file of impressions; every file has rows of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    surfaces = pa.array(["feed", "reels", "stories", "market", "search"])
    partial = file.with_suffix(".partial")
    writer = None
    for _ in range(FILE_ROWS // ROW_GROUP):
        user = rng.integers(0, 50_000_000, ROW_GROUP)
        surface = rng.choice(5, ROW_GROUP, p=[0.5, 0.25, 0.15, 0.07, 0.03]).astype(np.int8)
        logit = rng.standard_normal(ROW_GROUP, np.float32) * 0.8 - 4 + 0.2 * surface
        prediction = (1 / (1 + np.exp(-logit))).astype(np.float32)
        table = pa.table(
            {
                "row_id": np.arange(ROW_GROUP),
                "user_id": user,
                "label": (rng.random(ROW_GROUP, np.float32) < prediction).astype(np.float32),
                "prediction": prediction,
                "surface": pa.DictionaryArray.from_arrays(pa.array(surface), surfaces).cast(pa.string()),
                "age": (user % 7).astype(np.int32),
                "activity": rng.standard_exponential(ROW_GROUP, np.float32),
            }
        )
        writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=ROW_GROUP)
    assert writer is not None
    writer.close()
    partial.rename(file)


def worker(name: str, args: argparse.Namespace) -> list[str]:
    return [sys.executable, __file__, "--worker", name, "--rows", str(args.rows), "--folder", str(args.folder)]


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs one contender in a fresh process: CPU and wall seconds, peak MiB."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "ARROW_NUM_THREADS"), "1")
    keep = {"MIMALLOC_PURGE_DELAY": "-1"}  # as c2al sets it: no contender pays for pages that it gave back
    with subprocess.Popen(worker(name, args), stdout=subprocess.PIPE, env={**os.environ, **single, **keep}) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{name} failed"
    result: dict[str, float] = json.loads(text.splitlines()[-1])
    result["peak_mib"] = usage.ru_maxrss / 1024
    if name == "job":
        result["cpu"] = usage.ru_utime + usage.ru_stime
    print(f"{name:10} {result}", file=sys.stderr, flush=True)
    return result


def work(name: str, files: list[str]) -> None:
    """In the worker process: does the contender's work and prints what it took."""
    run = {"scan": scan, "scan_user": scan, "duckdb": duckdb_count, "polars": polars_count, "job": job}.get(name, count)
    started = prepare(name, files) if run is count else (files, name)
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    rows = run(*started)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    assert rows == len(files) * FILE_ROWS, (name, rows)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"cpu": cpu, "wall": wall}))


def scan(files: list[str], name: str) -> int:
    columns = COUNTED + ["user_id"] * (name == "scan_user")
    rows = 0
    for file in files:
        with pa.OSFile(file) as handle:
            reader = pq.ParquetFile(handle, read_dictionary=["surface"], pre_buffer=True)
            for i in range(reader.num_row_groups):
                rows += reader.read_row_group(i, columns=columns, use_threads=False).num_rows
    return rows


def prepare(name: str, files: list[str]) -> tuple[list[str], str]:
    """Compiles the kernels on a few rows."""
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.parquet"
        pq.write_table(pa.Table.from_batches([next(pq.ParquetFile(files[0]).iter_batches(1000))]), few)
        count([str(few)], name)
    return files, name


def count(files: list[str], name: str) -> int:
    import tomllib

    from c2al.config import DistConfig, parse_config
    from c2al.data.source import open_dataset
    from c2al.discovery.axes import Columns
    from c2al.discovery.passes import scan as product_scan
    from c2al.discovery.record import ScanRecord
    from c2al.distributed.process import process_group

    config = parse_config(tomllib.loads(CONFIG % ("true" if name == "jackknife" else "false")))
    record = ScanRecord(
        axes=config.axes,
        columns=Columns(prediction="prediction", label="label", user="user_id"),
        settings=config.discover,
        earlier_cuts={"activity": (0.2876821, 1.3862944)},
        files=(),
    )
    with process_group(DistConfig(device="cpu")) as world, tempfile.TemporaryDirectory() as folder:
        total = product_scan(open_dataset(files), record, Path(folder), world)
    return int(total.of_axis(config.axes[-1]).fine_CS22[..., 0].sum())


def duckdb_count(files: list[str], name: str) -> int:
    import duckdb

    connection = duckdb.connect(config={"threads": 1})
    query = """
        SELECT sum(n)::BIGINT FROM (
            SELECT surface, age, activity, bin, label, count(*) AS n, grouping(surface, age, activity) AS level
            FROM (SELECT surface, age, (activity >= 0.2876821)::INT + (activity >= 1.3862944)::INT AS activity,
                         floor(log2(prediction) * 64)::INT AS bin, label
                  FROM read_parquet($1))
            GROUP BY GROUPING SETS ((surface, age, activity, bin, label), (surface, bin, label), (age, bin, label),
                                    (activity, bin, label)))
        WHERE level = 0"""
    return int(connection.execute(query, [files]).fetchall()[0][0])


def polars_count(files: list[str], name: str) -> int:
    import polars as pl

    counted = (
        pl.scan_parquet(files)
        .select(
            "surface",
            "age",
            "label",
            activity=(pl.col("activity") >= 0.2876821).cast(pl.Int8) + (pl.col("activity") >= 1.3862944).cast(pl.Int8),
            bin=(pl.col("prediction").log(2) * 64).floor().cast(pl.Int16),
        )
        .group_by("surface", "age", "activity", "bin", "label")
        .len()
        .collect(engine="streaming")
    )
    return int(counted["len"].sum())


def job(files: list[str], name: str) -> int:
    from c2al.__main__ import main as c2al

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(CONFIG % "true")
        words = ["discover", "--config", str(config), "--scores", *files, "--output", f"{folder}/out"]
        assert c2al(words) == 0
        return int(json.loads(Path(folder, "out", "cohorts.json").read_text())["rows"])


def report(runs: dict[str, list[dict[str, float]]], rows: int) -> None:
    versions = {p: importlib.metadata.version(p) for p in ("numba", "numpy", "pyarrow", "duckdb", "polars")}
    stamp = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": " ".join(f"{k}={v}" for k, v in versions.items()),
        "rows": rows,
    }
    lines = []
    for name, results in runs.items():
        base = BASE.get(name)
        ratios = [r["cpu"] / b["cpu"] for r, b in zip(results, runs.get(base or "", []), strict=False)]
        median = {k: statistics.median(r[k] for r in results) for k in results[0]}
        lines.append(
            {
                "contender": name,
                "ns_cpu_a_row": f"{median['cpu'] / rows * 1e9:.2f}",
                "cpu_ratio": f"{statistics.median(ratios):.3f}" if ratios else "",
                "cpu_ratio_range": f"{min(ratios):.3f}-{max(ratios):.3f}" if ratios else "",
                "base": base if ratios else "",
                "wall_s": f"{median['wall']:.1f}",
                "peak_mib": f"{median['peak_mib']:.0f}",
                "repeats": len(results),
                **stamp,
            }
        )
    shown = ["contender", "ns_cpu_a_row", "cpu_ratio", "cpu_ratio_range", "base", "wall_s", "peak_mib"]
    print("  ".join(f"{c:>15}" for c in shown))
    for line in lines:
        print("  ".join(f"{line[c]:>15}" for c in shown))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as f:
        writer = csv.DictWriter(f, lines[0])
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
