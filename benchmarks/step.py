"""What does C2AL cost a training step, and does training wait for data?

    python benchmarks/step.py --config c2al/configs/conflict.toml
    python benchmarks/step.py --config c2al/configs/production.toml --rows 200000

Overhead: a baseline (lambda 0, heads absent) and a C2AL trainer of the same config take turns on the
same batches in memory, everything a step does included (pipeline, update, metrics); the ratio is taken
block by block, so a machine that slows down slows both. Data wait: the share of its time that a real
`c2al train` on Parquet spends waiting for the reader, over the log lines after the first.
"""

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from c2al.config import Config, load_config, replace
from c2al.data.synthetic import SURFACES, SynthConfig, synthesise
from c2al.distributed.process import World, process_group
from c2al.training.batches import training_reader
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer, train


def cohorts_file(path: Path) -> Path:
    """Head and tail on the surfaces that `synth` plants them on."""
    cohorts = [{"name": s, "conditions": [{"column": "surface", "equals": s}]} for s in SURFACES]
    head, tail = ({"axis": "surface", **next(c for c in cohorts if c["name"] == n)} for n in ("search", "marketplace"))
    axis = {"name": "surface", "columns": ["surface"], "cohorts": cohorts}
    chosen = {"head": head, "tail": tail, "reason": "planted"}
    path.write_text(json.dumps({"version": 1, "chosen": chosen, "axes": [axis]}))
    return path


def overhead(config: Config, world: World, folder: Path, blocks: int, steps: int) -> list[float]:
    """Time of a C2AL step over that of a baseline step, one ratio a block of `steps` steps of each."""
    arms = {}
    for name, weight in (("baseline", 0.0), ("c2al", 0.2)):
        arm = replace(config, **{"train.auxiliary_lambda": weight, "data.validation": ()})
        run = start_run(folder / name, arm, cohorts_file(folder / "cohorts.json") if weight else None, world)
        trainer = Trainer(run, world)
        kept = list(itertools.islice(iter(training_reader(run, world)), 8))
        arms[name] = (trainer, itertools.cycle(kept))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(blocks + 1):  # the first warms up
        # Alternate who goes first: the caches belong to the one before.
        for name in sorted(arms, reverse=block % 2 == 0):
            trainer, batches = arms[name]
            start = time.perf_counter()
            for _ in range(steps):
                trainer.advance(batches)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        speed = config.train.batch_size * steps / statistics.median(times[1:])
        print(f"{name}: median {statistics.median(times[1:]) / steps * 1e3:.2f} ms a step, {speed:,.0f} samples/s")
    return [c / b for b, c in zip(seconds["baseline"][1:], seconds["c2al"][1:], strict=True)]


def data_wait(config: Config, world: World, folder: Path, steps: int) -> tuple[float, float]:
    """(share of the time spent waiting for data, samples a second) of a real training run."""
    quiet = {"data.validation": (), "train.max_steps": steps, "train.log_every": max(steps // 6, 1)}
    epochs = 1 + steps // 10
    train(replace(config, **quiet, **{"train.epochs": epochs}), folder / "real", world)
    lines = (folder / "real" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"][1:]
    total = sum(r["seconds"]["total"] for r in records)
    rows = sum(r["seconds"]["total"] * r["samples_per_second"] for r in records)
    return sum(r["seconds"].get("data", 0.0) for r in records) / total, rows / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=300_000, help="synthetic impressions")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="steps of each arm in a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesise(SynthConfig(rows=args.rows), folder / "data")
        config = replace(load_config(args.config), **{"data.train": (str(folder / "data" / "train"),)})
        with process_group(config.dist) as world:
            ratios = overhead(config, world, folder, args.blocks, args.steps)
            wait, speed = data_wait(config, world, folder, args.steps * 6)
    median = statistics.median(ratios)
    spread = f"range {min(ratios):.3f}-{max(ratios):.3f}, {len(ratios)} pairs"
    print(f"C2AL step / baseline step: median {median:.3f} ({spread})")
    print(f"data wait: {wait:.2%} of the time at {speed:,.0f} samples/s")
    row = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} {os.cpu_count()} CPUs, {args.threads} threads",
        "versions": f"torch {torch.__version__}",
        "config": args.config.name,
        "step_ratio_median": round(median, 4),
        "step_ratio_min": round(min(ratios), 4),
        "step_ratio_max": round(max(ratios), 4),
        "data_wait_share": round(wait, 4),
        "samples_per_second": round(speed),
    }
    new = not args.output.exists()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
