"""How fast are predictions of raw rows beside the training model's forward?

    python benchmarks/serving.py --run runs/a --artifact artifact --data data/test [--rows 1000000]

Raw rows are Parquet files whose rows are read again and again up to `--rows`. `predict` counts everything
from the file to the prediction; `forward` is the sharded training model on batches that lie ready, and
`program` the exported program on the same batches. The lines take turns, `--rounds` times, and each
shows its median samples per second.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import about, write_table

from c2al.config import DistConfig
from c2al.data.source import open_dataset
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import process_group
from c2al.serving.predict import Predictor
from c2al.serving.reference import TrainingModel, arguments, batches, on_cpu
from c2al.training.run_folder import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--artifact", required=True, type=Path)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serving.csv")
    args = parser.parse_args()
    with process_group(DistConfig(device="cpu")) as world:
        run = on_cpu(open_run(args.run))
        training = CheckpointReader(run.checkpoints, world).with_newest(lambda p: TrainingModel(run, p, world))
        variants = {v: Predictor(args.artifact, v) for v in Predictor(args.artifact).artifact.variants}
        ready = list(batches(run.config, run, args.data))
        repeats = -(-args.rows // sum(batch.rows for batch in ready))
        files = open_dataset(list(args.data)) * repeats

        def forward() -> int:
            for _ in range(repeats):
                for batch in ready:
                    training.predict(batch)
            return repeats * sum(batch.rows for batch in ready)

        def program(predictor: Predictor) -> int:
            for _ in range(repeats):
                for batch in ready:
                    predictor.program(*arguments(batch))
            return repeats * sum(batch.rows for batch in ready)

        def predict(predictor: Predictor) -> int:
            size = predictor.schema.batch_size
            return sum(len(predictor.run(rows, size)) for rows, _ in predictor.steps(files, size))

        calls: dict[str, Callable[[], int]] = {"training model, forward": forward}
        for name, predictor in variants.items():
            calls[f"{name}, program"] = lambda p=predictor: program(p)
            calls[f"{name}, predict raw rows"] = lambda p=predictor: predict(p)
        with torch.no_grad():
            speeds = timed(calls, args.rounds)
    base = statistics.median(speeds["training model, forward"])
    lines = []
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:32} {median:12,.0f} samples/s  {median / base:6.2f} of the forward")
        lines.append({"line": name, "rows": args.rows, "samples_per_s": round(median), "of_forward": median / base})
    write_table(args.output, [{**line, **about()} for line in lines])


def timed(calls: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Samples per second of each call, taken in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            rows = call()
            speeds[name].append(rows / (time.perf_counter() - start))
    return speeds


if __name__ == "__main__":
    main()
