"""What does C2AL cost a training step, what do its dynamics cost, and does training wait for data?

    python benchmarks/step.py [--shapes dhen-production demo] [--precision float32] [--compile off] [--blocks 9]

Three trainers of one configuration take turns on the same batches in memory, everything a step does included
(pipeline, update, metrics); ratios are taken block by block, so a machine that slows down slows all:

baseline   no auxiliary prediction heads
c2al       a head and a tail cohort, one linear auxiliary prediction head each
dynamics   the same with the Gramian at h taken once per block

"dynamics" is what that adds to a step at the default train.log_every. Data wait is the share of its time that a real
`c2al train` on Parquet spends waiting for the reader, over the log lines after the first. Rows go to
benchmarks/results/step.csv, written after every shape.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from machine import RESULTS, about, keep_freed_memory, write_table
from made_rows import write
from shapes import SHAPES, Shape

from c2al.config import Config, TrainConfig, replace
from c2al.distributed.process import World, process_group
from c2al.training.batches import training_reader
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer, train

KEPT = 8
"""Batches in memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["demo", "dhen-production"])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", choices=("off", "on"), default="off", help="as train.compile")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="steps of each trainer in a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = []
    for name in arguments.shapes:
        shape = SHAPES[name]()
        with tempfile.TemporaryDirectory() as folder:
            # One epoch of what the data wait is measured on: opening the files again is no part of it.
            count = shape.batch * (max(KEPT, arguments.steps * 6) + 1)
            write(shape.config.data, count, Path(folder) / "data")
            row = {"shape": name, "precision": arguments.precision, "compile": arguments.compile, "batch": shape.batch}
            row |= measure(shape, arguments, Path(folder))
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row | about())
        write_table(arguments.output / "step.csv", rows, key=("shape", "precision", "compile"))


def measure(shape: Shape, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = replace(
        shape.config,
        **{
            "axes": (),
            "data.train": (str(folder / "data"),),
            "data.validation": (),
            "data.test": (),
            "train.precision": arguments.precision,
            "train.compile": arguments.compile,
            "train.epochs": 10**6,
            "train.eval_every": 0,
            "train.checkpoint.every_steps": 0,
        },
    )
    with process_group(config.dist) as world:
        seconds = blocks(config, world, folder, arguments.blocks, arguments.steps)
        wait, speed = data_wait(config, world, folder, arguments.steps * 6)
    steps = {name: statistics.median(spent) / arguments.steps for name, spent in seconds.items()}
    row: dict[str, Any] = {f"{name}_ms": round(spent * 1e3, 3) for name, spent in steps.items()}
    over = [c / b for b, c in zip(seconds["baseline"], seconds["c2al"], strict=True)]
    row |= {f"c2al_over_baseline_{n}": round(f(over), 4) for n, f in SUMMARIES.items()}
    # Once per block instead of once per log_every steps.
    share = arguments.steps / TrainConfig().log_every
    added = [(d / c - 1) * share for c, d in zip(seconds["c2al"], seconds["dynamics"], strict=True)]
    row |= {f"dynamics_{n}": round(f(added), 4) for n, f in SUMMARIES.items()}
    return row | {"blocks": len(over), "data_wait": round(wait, 4), "samples_per_second": round(speed)}


SUMMARIES: dict[str, Any] = {"median": statistics.median, "min": min, "max": max}


def blocks(config: Config, world: World, folder: Path, count: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every block of every trainer."""
    trainers = {}
    for name, log_every in (("baseline", 10**9), ("c2al", 10**9), ("dynamics", steps)):
        weight = 0.0 if name == "baseline" else 0.2
        arm = replace(config, **{"train.auxiliary_lambda": weight, "train.log_every": log_every})
        cohorts = write_cohorts(config, folder) if weight else None
        run = start_run(folder / name, arm, cohorts, world)
        kept = list(itertools.islice(iter(training_reader(run, world)), KEPT))
        trainers[name] = (Trainer(run, world), itertools.cycle(kept))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for block in range(count + 1):
        # Who goes first alternates: the caches belong to the one before.
        for name in sorted(trainers, reverse=block % 2 == 0):
            trainer, batches = trainers[name]
            start = time.perf_counter()
            for _ in range(steps):
                trainer.advance(batches)
            seconds[name].append(time.perf_counter() - start)
    return {name: spent[1:] for name, spent in seconds.items()}  # the first warms up


def write_cohorts(config: Config, folder: Path) -> Path:
    """Head and tail: the two commonest values of the first feature that has one value per row."""
    column = next(f.column for f in config.data.sparse if not f.max_length and f.encoding != "bucketise")
    values = pq.read_table(folder / "data", columns=[column])[column].value_counts().to_pylist()
    values.sort(key=lambda entry: -entry["counts"])
    cohorts = [
        {"name": f"{column}={entry['values']}", "conditions": [{"column": column, "equals": entry["values"]}]}
        for entry in values[:2]
    ]
    head, tail = ({"axis": "made", **cohort} for cohort in cohorts)
    tree = {
        "format": "c2al.cohorts",
        "version": 2,
        "chosen": {"head": head, "tail": tail, "reason": "the commonest"},
        "axes": [{"name": "made", "columns": [column], "cohorts": cohorts}],
    }
    path = folder / "cohorts.json"
    path.write_text(json.dumps(tree))
    return path


def data_wait(config: Config, world: World, folder: Path, steps: int) -> tuple[float, float]:
    """(share of the time spent waiting for data, samples per second) of a real training run."""
    quiet = {"train.auxiliary_lambda": 0.0, "train.max_steps": steps, "train.log_every": max(steps // 6, 1)}
    train(replace(config, **quiet), folder / "real", world)
    lines = (folder / "real" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"][1:]
    total = sum(r["seconds"]["total"] for r in records)
    rows = sum(r["seconds"]["total"] * r["samples_per_second"] for r in records)
    return sum(r["seconds"].get("data", 0.0) for r in records) / total, rows / total


if __name__ == "__main__":
    main()
