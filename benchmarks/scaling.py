"""Do time and memory of the jobs grow with rows, tables, ranks and segments?

    python benchmarks/scaling.py [--rows 1e5 1e6 1e7] [--discover-rows 1e8]

Every point is `c2al train`, `score`, `discover` or `evaluate` on impressions of `c2al synth`, in a process of
its own with one thread. The model is small on purpose: what is asked is what grows, not how fast a model is.

rows       all four jobs over each of --rows, from start to end
tables     train and score with more embedding tables
ranks      train, score and discover on one and on two ranks (torchrun)
segments   discover and evaluate with more cohorts
The last three take the second of --rows. --discover-rows scans the largest scores again and again.

Points take turns, --repeats times. After the first turn those of over --longest seconds are left out, and no
turn begins after --seconds. Medians go to benchmarks/results/scaling.csv after every point. Peak memory is that
of the largest process. `flat` is said of a job whose peak grows at most by a tenth from one of --rows to the next.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from machine import RESULTS, about, write_table

STAGES = ("train", "score", "discover", "evaluate")
FLAT = 1.1
"""Largest growth of the peak from one number of rows to the next."""
BUDGET = {"evaluate": 1024.0}
"""MiB that a job allows itself for rows at most: evaluate collects the rows of a share of the users."""
COLUMNS = ("user_id", "item", "u0", "u1", "u2", "u3", "grp", "cat", "hour")
USER_ROWS = 20
"""Impressions per user."""
SPLITS = ("train", "validation", "test")
SETTINGS = """
data.train = [{data}]
data.time = "time"
data.sparse = [{sparse}]
axes = [{{name = "users", column = "user_id", kind = "edges", edges = {edges}}}]
model.embedding_dim = 8
model.layers = 1
model.interactions = ["linear"]
model.fields = 8
model.shortcut = "none"
train.batch_size = 8192
train.compile = "off"
dist.device = "cpu"
evaluate.replicates = 200
"""


@dataclasses.dataclass(frozen=True)
class Point:
    """One job at one size."""

    stage: str
    rows: int
    tables: int = 8
    ranks: int = 1
    segments: int = 10

    @property
    def name(self) -> str:
        """Of its output within the folder of its rows."""
        return f"{self.stage}-{self.tables}-{self.ranks}-{self.segments}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = {"type": lambda text: int(float(text)), "nargs": "*"}
    parser.add_argument("--rows", **count, default=[10**5, 10**6, 10**7])
    parser.add_argument("--discover-rows", **count, default=[], help="multiples of the largest of --rows")
    parser.add_argument("--tables", **count, default=[8, 64])
    parser.add_argument("--ranks", **count, default=[1, 2])
    parser.add_argument("--segments", **count, default=[10, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds; longer points are run once")
    parser.add_argument("--seconds", type=float, default=240.0, help="no further turn begins after that many")
    parser.add_argument("--folder", type=Path, help="keeps the impressions there (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.csv")
    args = parser.parse_args()
    begun, machine = time.perf_counter(), about()
    runs: dict[Point, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for turn in range(args.repeats):
            if turn and time.perf_counter() - begun > args.seconds:
                break
            for point in points(args):
                if turn and runs[point][0]["wall_s"] > args.longest:
                    continue
                made = Work(folder, point, max(args.rows))
                made.prepare()
                runs.setdefault(point, []).append(measure(made.command()))
                write_table(args.output, [{**line(p, r), **machine} for p, r in runs.items()])
    report(runs)


def points(args: argparse.Namespace) -> Iterable[Point]:
    """In an order in which every point finds the outputs that it reads; each once."""
    base = args.rows[min(1, len(args.rows) - 1)]
    every = [Point(stage, rows) for rows in args.rows for stage in STAGES]
    every += [Point(stage, base, tables=n) for n in args.tables for stage in ("train", "score")]
    every += [Point(stage, base, ranks=n) for n in args.ranks for stage in ("train", "score", "discover")]
    every += [Point(stage, base, segments=n) for n in args.segments for stage in ("discover", "evaluate")]
    every += [Point("discover", rows) for rows in args.discover_rows]
    return dict.fromkeys(every)


class Work:
    """The files of a point and the command that makes them."""

    def __init__(self, folder: Path, point: Point, largest: int):
        self.point = point
        self.rows = min(point.rows, largest)
        """Rows of the files; more are had by reading them repeatedly."""
        self.place = folder / f"rows-{self.rows}"
        self.data = [str(self.place / "data" / split) for split in SPLITS]
        self.config = self.place / f"{point.tables}-{point.segments}.toml"
        self.output = folder / f"rows-{point.rows}" / point.name

    def prepare(self) -> None:
        """Makes the impressions and the configuration, and takes the output of an earlier turn away."""
        users = max(self.rows // USER_ROWS, 100)
        if not (self.place / "data").exists():
            self.place.mkdir(parents=True, exist_ok=True)
            words = ["synth", "--world", "privileged", "--rows", str(self.rows), "--users", str(users)]
            measure([*c2al(1), *words, "--output", str(self.place / "data")])
        sparse = [
            f'{{column = "{COLUMNS[i % len(COLUMNS)]}", name = "t{i}", num_embeddings = 10000}}'
            for i in range(self.point.tables)
        ]
        edges = [users * i // self.point.segments for i in range(1, self.point.segments)]
        data = ", ".join(map(json.dumps, self.data))
        self.config.write_text(SETTINGS.format(data=data, sparse=", ".join(sparse), edges=edges))
        shutil.rmtree(self.output, ignore_errors=True)

    def command(self) -> list[str]:
        point = self.point
        config, output = ["--config", str(self.config)], ["--output", str(self.output)]
        words = [*c2al(point.ranks), point.stage]
        if point.stage == "train":
            return [*words, *config, *output]
        if point.stage == "score":
            return [*words, "--run", self._of("train", tables=point.tables), "--data", *self.data, *output]
        scores = self._of("score")
        if point.stage == "discover":
            return [*words, *config, "--scores", *self._repeated(scores), *output]
        cohorts = self._of("discover", segments=point.segments) + "/cohorts.json"
        return [*words, *config, "--pair", scores, scores, "--cohorts", cohorts, *output]

    def _of(self, stage: str, **sizes: int) -> str:
        """Output of an earlier point over the same files."""
        return str(self.place / Point(stage, self.rows, **sizes).name)

    def _repeated(self, scores: str) -> list[str]:
        """The parts of the scores, under as many names as the point's rows need."""
        times = self.point.rows // self.rows
        if times == 1:
            return [scores]
        links = self.output.with_name("linked")
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir(parents=True)
        for part in Path(scores).glob("*.parquet"):
            for i in range(times):
                (links / f"{i}-{part.name}").symlink_to(part)
        return [str(links)]


def c2al(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "c2al"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", "c2al", "--"]
    return [sys.executable, *launch]


WATCH = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([code, spent.ru_utime + spent.ru_stime, spent.ru_maxrss / 1024], file)
"""


def measure(words: Sequence[str]) -> dict[str, float]:
    """Runs a command; its wall and CPU seconds with those of its processes, and the peak of the largest.

    A small process starts it: Linux counts the memory of whoever forks into the peak of the new process.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+") as said:
        found = Path(folder) / "found.json"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-S", "-c", WATCH, str(found), *words],
            stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
        )  # fmt: skip
        wall = time.perf_counter() - start
        code, cpu, peak = json.loads(found.read_text())
        if code:
            said.seek(0)
            raise SystemExit(f"{' '.join(words)}\nended with {code}:\n{said.read()[-3000:]}")
    return {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak}


def line(point: Point, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    medians = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
    return {**dataclasses.asdict(point), **medians, "repeats": len(runs)}


def report(runs: dict[Point, list[dict[str, float]]]) -> None:
    lines = {point: line(point, found) for point, found in runs.items()}
    names = list(next(iter(lines.values())))
    for row in [names, *([f"{v:,}" if isinstance(v, int | float) else v for v in r.values()] for r in lines.values())]:
        print("".join(f"{cell:>12}" for cell in row))
    print()
    for stage in STAGES:
        sizes = sorted((p for p in lines if p == Point(stage, p.rows)), key=lambda p: p.rows)
        for small, large in itertools.pairwise(sizes):
            before, after = lines[small], lines[large]
            millions = (large.rows - small.rows) / 1e6
            growth, added = after["peak_mib"] / before["peak_mib"], after["peak_mib"] - before["peak_mib"]
            us = (after["cpu_s"] - before["cpu_s"]) / millions
            verdict = "flat" if growth <= FLAT else f"not flat, {added / millions:,.1f} MiB per million rows"
            if stage in BUDGET and after["peak_mib"] <= lines[sizes[0]]["peak_mib"] + BUDGET[stage]:
                verdict += f", within its {BUDGET[stage]:,.0f} MiB for rows"
            print(
                f"{stage:9}{small.rows:>12,} -> {large.rows:<12,} peak x {growth:.2f}: {verdict}; {us:,.2f} us per row"
            )


if __name__ == "__main__":
    main()
