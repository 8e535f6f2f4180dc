"""How much faster do two ranks train than one, where each has a core of its own?

    python benchmarks/two_ranks.py [--shape wukong-26x16] [--precision float32] [--rounds 20]

Contenders are `c2al train` from Parquet, with one thread per rank:

one          one rank
two          two ranks, the same global batch: each takes half of it
two larger   two ranks and twice the global batch: each takes what the one rank takes
apart        two jobs of one rank that know nothing of each other: what the machine gives
bfloat16     one rank in bfloat16, to be compared with one in float32

The speed of a machine that others share drifts by a third within minutes. So all contenders are started and warmed
up first, and then take turns of some seconds: whose turn it is not is stopped by a signal. A round is a turn of each,
and the order of rounds alternates. The ratios are those of turns of the same round. What is between two lines of a
job's log is counted where the job was never stopped in it.

Medians, minima and maxima over the rounds go to ranks.csv, with the median and the quartiles of the ratios to "one".
Rows of other shapes, precisions and contenders stay in it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import RESULTS, about, write_table
from made_rows import write
from shapes import SHAPES

from c2al.config import replace, save_config

CONTENDERS = ("one", "two", "two larger", "apart", "bfloat16")
RANKS = {"two": 2, "two larger": 2}
"""Of a job; one where nothing is said."""
PARTS = 4
"""Files of the data, so that every rank has some."""
BATCHES = 64
"""Batches of one rank in the data, which is read again and again."""
POLL = 0.02
"""Seconds between two looks at a job's log."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wukong-26x16")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of all but bfloat16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:4])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--window", type=int, default=8, help="steps between two lines of the log")
    parser.add_argument(
        "--windows",
        type=int,
        choices=range(1, 1000),
        metavar="WINDOWS",
        default=2,
        help="windows that a turn measures, after one that it does not",
    )
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="train.compile of every contender")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of ranks.csv")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it takes its jobs with it
    torch.set_num_threads(1)  # as its jobs have: the table names the threads of a rank
    shape = SHAPES[arguments.shape]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        for part in range(PARTS):
            write(shape.config.data, shape.batch * BATCHES // PARTS, Path(folder) / "data" / f"p{part}")
        jobs = {}
        for name in arguments.contenders:
            batch = shape.batch * (2 if name == "two larger" else 1)
            precision = precision_of(name, arguments)
            config = Path(folder) / f"{name.replace(' ', '-')}.toml"
            save_config(training_config(shape.config, arguments, Path(folder), batch, precision), config)
            jobs[name] = [
                started.enter_context(training(config, RANKS.get(name, 1), config.with_suffix(f".{number}")))
                for number in range(2 if name == "apart" else 1)
            ]
            print(f"{name}: started, warms up", file=sys.stderr)
            turn(jobs[name], arguments.windows)  # compiles
        found: dict[str, list[float]] = {name: [] for name in arguments.contenders}
        for number in range(arguments.rounds):
            # Who goes first alternates: the machine's speed drifts.
            for name in arguments.contenders[:: -1 if number % 2 else 1]:
                found[name].append(turn(jobs[name], arguments.windows))
            table = rows(found, arguments)
            write_table(arguments.output / "ranks.csv", table, key=("shape", "precision", "contender"))
            said = ", ".join(f"{row['contender']} {row['samples_per_second']:,}" for row in table)
            print(f"round {number + 1} of {arguments.rounds}, medians so far, samples/s: {said}", file=sys.stderr)
    for row in rows(found, arguments):
        print({k: row[k] for k in ("contender", "samples_per_second", "over_one", "quarter", "three_quarters")})


def precision_of(contender: str, arguments: argparse.Namespace) -> str:
    return "bfloat16" if contender == "bfloat16" else str(arguments.precision)


def training_config(config: Any, arguments: argparse.Namespace, folder: Path, batch: int, precision: str) -> Any:
    """The shape's config on the written data, without end and without anything but steps and log lines."""
    return replace(
        dataclasses.replace(config, axes=()),
        **{
            "data.train": (str(folder / "data"),),
            "data.validation": (),
            "data.test": (),
            "train.batch_size": batch,
            "train.epochs": 10**6,
            "train.precision": precision,
            "train.compile": arguments.compile,
            "train.log_every": arguments.window,
            "train.eval_every": 0,
            "train.y_every": 0,
            "train.checkpoint.every_steps": 0,
        },
    )


class Job:
    """A training run whose ranks can be stopped and let go on."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]], said: list[Path], run: Path) -> None:
        self._ranks, self._said, self._log = ranks, said, run / "metrics.jsonl"
        self._read = 0

    def signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)

    def windows(self) -> list[tuple[float, float]]:
        """(samples, seconds) of every log line since the last call. Raises SystemExit when a rank has ended."""
        for rank, said in zip(self._ranks, self._said, strict=True):
            if rank.poll() is not None:
                raise SystemExit(f"{said.stem}: ended with {rank.returncode}\n{said.read_text()[-2000:]}")
        if not self._log.exists():
            return []
        with self._log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        records = [r for r in map(json.loads, whole.splitlines()) if r["kind"] == "train"]
        return [(r["samples_per_second"] * r["seconds"]["total"], r["seconds"]["total"]) for r in records]


@contextlib.contextmanager
def training(config: Path, ranks: int, run: Path) -> Iterator[Job]:
    """A job of `ranks` processes; killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "c2al", "train", "--config", str(config), "--output", str(run)]
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started, said = [], [run.with_name(f"{run.name}-rank{rank}.txt") for rank in range(ranks)]
    try:
        for rank, path in enumerate(said):
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("wb") as file:
                started.append(subprocess.Popen(command, env=environment, stderr=file))
        yield Job(started, said, run)
    finally:
        for process in started:
            process.kill()
            process.wait()


def turn(jobs: list[Job], windows: int) -> float:
    """Samples/s of all jobs together. They run until each has written `windows` log lines after its first.

    A job's first line is not counted: it was stopped in what the line tells of, or it compiled.
    """
    for job in jobs:
        job.windows()
        job.signal(signal.SIGCONT)
    counted: list[list[tuple[float, float]]] = [[] for _ in jobs]
    while any(len(lines) <= windows for lines in counted):
        time.sleep(POLL)
        for job, lines in zip(jobs, counted, strict=True):
            lines += job.windows()
    for job in jobs:
        job.signal(signal.SIGSTOP)
    return sum(sum(n for n, _ in lines[1:]) / sum(s for _, s in lines[1:]) for lines in counted)


def rows(found: dict[str, list[float]], arguments: argparse.Namespace) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    for name, values in found.items():
        if not values:
            continue
        row: dict[str, object] = {
            "shape": arguments.shape,
            "precision": precision_of(name, arguments),
            "contender": name,
        }
        row |= {"rounds": len(values), "samples_per_second": round(statistics.median(values))}
        row |= {"min": round(min(values)), "max": round(max(values))}
        ratios = [v / one for v, one in zip(values, found.get("one", []), strict=False)]
        quarters = np.quantile(ratios, (0.5, 0.25, 0.75)).round(3).tolist() if ratios else ("",) * 3
        row |= dict(zip(("over_one", "quarter", "three_quarters"), quarters, strict=True))
        table.append(row | about())
    return table


if __name__ == "__main__":
    main()
