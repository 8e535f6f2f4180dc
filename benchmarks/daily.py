"""Is a model that is trained on day after day as good as one that is trained on everything again?

    python benchmarks/daily.py --output docs/results/daily.md

Five days of the synthetic world `conflict`, four fifths of each day's impressions to train on, the rest to
test with. After every day four models are judged on that day's test rows:
    each day anew    from scratch on this day alone
    weights          the day before's model, trained on this day; a new optimizer
    weights + state  the same with its optimizer state: what `train --start-from RUN --start-optimizer` does
    all so far       from scratch on this day and all before it, in one run: after d days d times the work
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from c2al.config import Config, load_config, replace
from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.process import World, process_group
from c2al.files import write_atomically
from c2al.ne import PROBABILITY_CLIP, normalized_entropy
from c2al.training.score import score
from c2al.training.start_from import Start
from c2al.training.trainer import train

DAYS = 5
DAY_SECONDS = 86400
CONFIG = Path(__file__).parents[1] / "c2al" / "configs" / "conflict.toml"
ARMS = ("each day anew", "weights", "weights + state", "all so far")


def ne_of(prediction: np.ndarray, label: np.ndarray) -> float:
    p = np.clip(prediction.astype(np.float64), PROBABILITY_CLIP, 1 - PROBABILITY_CLIP)
    loss = -(label * np.log(p) + (1 - label) * np.log1p(-p)).sum()
    return float(normalized_entropy(loss, label.sum(), (1 - label).sum()))


def write_days(folder: Path, rows: int, seed: int) -> list[float]:
    """Writes folder/day-D/{train,test}; returns the NE of the true probabilities on each day's test rows."""
    synthesise(SynthConfig(rows=rows, seed=seed), folder / "world")
    table = pq.read_table(folder / "world" / "train")
    return [_write_day(folder, table, day) for day in range(DAYS)]


def _write_day(folder: Path, table: pa.Table, day: int) -> float:
    mine = np.asarray(table["time"]) // DAY_SECONDS
    today = table.filter(pa.array(mine == mine.min() + day))
    is_test = np.asarray(today["row_id"]) % 5 == 0
    for split, rows in (("train", ~is_test), ("test", is_test)):
        path = folder / f"day-{day + 1}" / split
        path.mkdir(parents=True)
        pq.write_table(today.filter(pa.array(rows)), path / "part.parquet", row_group_size=4096)
    test = today.filter(pa.array(is_test))
    return ne_of(np.asarray(test["true_p"]), np.asarray(test["label"]).astype(np.float64))


def over(config: Config, folder: Path, days: Sequence[int]) -> Config:
    data = dataclasses.replace(
        config.data, train=tuple(str(folder / f"day-{day + 1}" / "train") for day in days), validation=(), test=()
    )
    return dataclasses.replace(config, data=data)


def judged(run: Path, folder: Path, day: int, world: World) -> float:
    output = run.with_name(f"{run.name}-scores")
    score(run, [str(folder / f"day-{day + 1}" / "test")], output, world)
    table = pq.read_table(output)
    return ne_of(np.asarray(table["prediction"]), np.asarray(table["label"]).astype(np.float64))


def days(config: Config, folder: Path, world: World) -> dict[str, list[float]]:
    """Arm -> NE on every day's test rows."""
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for day in range(DAYS):
        for number, arm in enumerate(ARMS):
            run = folder / f"{number}-{day}"
            start = None
            if day and arm.startswith("weights"):
                start = Start(run=folder / f"{number}-{day - 1}", optimizer="state" in arm)
            train(over(config, folder, range(day + 1) if arm == "all so far" else [day]), run, world, start=start)
            found[arm].append(judged(run, folder, day, world))
    return found


def page(found: list[dict[str, list[float]]], best: list[list[float]], arguments: argparse.Namespace) -> str:
    """Means over the seeds, as Markdown."""
    lines = ["| day | " + " | ".join(ARMS) + " | true probabilities |", "|---|" + "---|" * (len(ARMS) + 1)]
    for day in range(DAYS):
        shown = [statistics.mean(seed[arm][day] for seed in found) for arm in ARMS]
        shown.append(statistics.mean(seed[day] for seed in best))
        lines.append(f"| {day + 1} | " + " | ".join(f"{ne:.4f}" for ne in shown) + " |")
    about = machine.about()
    text = (__doc__ or "").split("\n\n")
    return "\n".join(
        [
            "# Training day after day",
            "",
            text[0],
            "",
            text[2].rstrip().replace("\n    ", "\n- "),
            "",
            f"NE of each day's test rows, mean over {len(found)} seeds; "
            f"{arguments.rows // 14:,} impressions per day, one epoch, batches of {arguments.batch_size}, "
            "constant learning rates, no auxiliary losses. The world itself does not drift.",
            "",
            *lines,
            "",
            f"    python benchmarks/daily.py --rows {arguments.rows} --batch-size {arguments.batch_size} "
            f"--seeds {' '.join(map(str, arguments.seeds))} --output docs/results/daily.md",
            "",
            f"{about['date']}, {about['machine']}, {about['versions']}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=560_000, help="of the world's fourteen days, of which five are used"
    )
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, help="Markdown page to write; without it, to standard output")
    arguments = parser.parse_args()
    config = replace(
        load_config(CONFIG),
        **{
            "train.epochs": 1,
            "train.eval_every": 0,
            "train.batch_size": arguments.batch_size,
            "train.log_every": 1_000_000,
            "train.optimizer.decay": "constant",
            "train.optimizer.warmup_steps": 0,
            "dist.device": "cpu",
        },
    )
    found, best = [], []
    with tempfile.TemporaryDirectory() as name, process_group(config.dist) as world:
        for seed in arguments.seeds:
            folder = Path(name) / str(seed)
            best.append(write_days(folder, arguments.rows, seed))
            found.append(days(replace(config, seed=seed), folder, world))
    text = page(found, best, arguments)
    if arguments.output:
        write_atomically(arguments.output, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
