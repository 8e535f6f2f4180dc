"""How much faster do two ranks train than one, where each has a core of its own?

    python benchmarks/two_ranks.py [--shape wukong-26x16] [--precision float32] [--rounds 4]

Each round runs, one after the other and with one thread per rank, `c2al train` from Parquet as

one          one rank
two          two ranks under torchrun, the same global batch: each takes half of it
two larger   two ranks and twice the global batch: each takes what the one rank takes
apart        two jobs of one rank at the same time that know nothing of each other: what the machine gives

samples/s is that of the log's last line, without the steps before its first. Medians, minima and maxima over the
rounds go to benchmarks/results/ranks.csv, with the median of the ratios to "one" in the same round.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import RESULTS, about, write_table
from made_rows import write
from shapes import SHAPES

from c2al.config import replace, save_config

CONTENDERS = ("one", "two", "two larger", "apart")
PARTS = 4
"""Files of the data, so that every rank has some."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wukong-26x16")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="of the smaller batch; the first quarter is warm-up")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]()
    with tempfile.TemporaryDirectory() as folder:
        for part in range(PARTS):
            write(shape.config.data, shape.batch * (arguments.steps // PARTS + 1), Path(folder) / "data" / f"p{part}")
        configs = {}
        for name, batch, steps in (
            ("one", shape.batch, arguments.steps),
            ("two larger", 2 * shape.batch, arguments.steps // 2),
        ):
            configs[name] = Path(folder) / f"{name.replace(' ', '-')}.toml"
            save_config(training_config(shape.config, arguments, Path(folder), batch, steps), configs[name])
        found: dict[str, list[float]] = {name: [] for name in arguments.contenders}
        for number in range(arguments.rounds):
            # Who goes first alternates: the machine's speed drifts.
            for name in arguments.contenders[:: -1 if number % 2 else 1]:
                output = Path(folder) / f"{name.replace(' ', '-')}-{number}"
                found[name].append(samples_per_second(name, configs.get(name, configs["one"]), output))
            write_table(arguments.output / "ranks.csv", rows(found, arguments))
    for row in rows(found, arguments):
        print({k: row[k] for k in ("contender", "samples_per_second", "over_one")})


def training_config(config: Any, arguments: argparse.Namespace, folder: Path, batch: int, steps: int) -> Any:
    """The shape's config on the written data, with a log line at each quarter of its steps."""
    return replace(
        dataclasses.replace(config, axes=()),
        **{
            "data.train": (str(folder / "data"),),
            "data.validation": (),
            "data.test": (),
            "train.batch_size": batch,
            "train.precision": arguments.precision,
            "train.compile": arguments.compile,
            "train.max_steps": steps,
            "train.log_every": max(steps // 4, 1),
            "train.eval_every": 0,
            "train.y_every": 0,
            "train.checkpoint.every_steps": 0,
        },
    )


def samples_per_second(contender: str, config: Path, output: Path) -> float:
    """Of all ranks together; the sum of both jobs for "apart"."""
    ranks = 1 if contender in ("one", "apart") else 2
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    jobs = []
    for number in range(2 if contender == "apart" else 1):
        run = output / str(number)
        command = [sys.executable, *launch, "-m", "c2al", "train", "--config", str(config), "--output", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        jobs.append((run, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)))
    total = 0.0
    for run, job in jobs:
        _, said = job.communicate()
        if job.returncode:
            raise SystemExit(f"{contender}: failed\n{said[-2000:]}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = [r for r in records if r["kind"] == "train"][1:]
        seconds = [r["seconds"]["total"] for r in measured]
        total += sum(s * r["samples_per_second"] for s, r in zip(seconds, measured, strict=True)) / sum(seconds)
    return total


def rows(found: dict[str, list[float]], arguments: argparse.Namespace) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for name, values in found.items():
        if not values:
            continue
        ratios = [v / one for v, one in zip(values, found.get("one", []), strict=False)]
        row: dict[str, object] = {"shape": arguments.shape, "precision": arguments.precision, "contender": name}
        row |= {"rounds": len(values), "samples_per_second": round(statistics.median(values))}
        row |= {"min": round(min(values)), "max": round(max(values))}
        row |= {"over_one": round(statistics.median(ratios), 3) if ratios else ""}
        table.append(row | about())
    return table


if __name__ == "__main__":
    main()
