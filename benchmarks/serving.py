"""What does serving a C2AL-trained model cost beside a baseline-trained one, and raw rows beside a bare forward?

    python benchmarks/serving.py [--rows 1000000]

Impressions of `c2al synth`, a baseline and a C2AL run on the cohorts that `c2al discover` finds in its scores,
and both artifacts are made first; --folder keeps them for the next time. Then, in this process:

costs        `c2al serve-check` of the two artifacts: parameters, FLOPs, p50 and p99 of batches of 1, 64 and 1,024
speed        rows per second over all --rows: `c2al score` and `c2al predict` (from Parquet to Parquet), the
             training model's forward and the program's on batches that lie ready

The lines of a part take turns. The two artifacts must have the same parameters and FLOPs, and `predict` must give
what `score` gives, bit for bit; else the script fails. Both tables go to benchmarks/results/serving.csv.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from machine import RESULTS, about, write_table

from c2al.__main__ import main as c2al
from c2al.config import DistConfig
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import process_group
from c2al.serving.check import check, text_of
from c2al.serving.predict import Predictor, predict
from c2al.serving.reference import TrainingModel, arguments, batches, on_cpu
from c2al.training.run_folder import open_run
from c2al.training.score import score

CONFIG = Path(__file__).parents[1] / "c2al" / "configs" / "conflict.toml"
SPLITS = ("train", "validation", "test")
FORWARD = "training model, forward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--steps", type=int, default=200, help="training steps of both runs")
    parser.add_argument("--calls", type=int, default=200, help="timed calls per batch size")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes over all rows")
    parser.add_argument("--variants", nargs="+", default=["float"], help="programs that are timed over all rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps impressions and artifacts (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "made"
        if not folder.exists():
            make(folder, args.rows, args.steps)
        lines = costs(folder, args.calls)
        write_table(args.output, [{**line, **about()} for line in lines])
        lines += speed(folder, args.rounds, args.variants)
        write_table(args.output, [{**line, **about()} for line in lines])


def make(folder: Path, rows: int, steps: int) -> None:
    """Impressions, the two runs and their artifacts, as a user makes them."""
    data = {split: str(folder / "data" / split) for split in SPLITS}
    job("synth", "--rows", rows, "--output", folder / "data")
    config = ["--config", CONFIG]
    for split, path in data.items():
        config += [f"--data.{split}", [path]]
    config += ["--train.max_steps", steps, "--train.eval_every", 0, "--train.compile", "off", "--dist.device", "cpu"]
    job("train", *config, "--output", folder / "baseline")
    job("score", "--run", folder / "baseline", "--data", data["validation"], "--output", folder / "scores")
    job("discover", *config, "--discover.min_rows", 1, "--scores", folder / "scores", "--output", folder / "cohorts")
    cohorts = ["--cohorts", folder / "cohorts" / "cohorts.json", "--train.auxiliary_lambda", 0.1]
    job("train", *config, *cohorts, "--output", folder / "c2al")
    for name in ("baseline", "c2al"):
        job("export", "--run", folder / name, "--data", data["test"], "--output", folder / f"{name}-artifact")


def job(*words: object) -> None:
    if status := c2al(list(map(str, words))):
        raise SystemExit(f"c2al {words[0]} ended with {status}")


def costs(folder: Path, calls: int) -> list[dict[str, Any]]:
    """The table of `c2al serve-check`. Ends the script where the artifacts are not of one size."""
    artifacts = folder / "c2al-artifact", folder / "baseline-artifact"
    ours, base = (Predictor(artifact).artifact for artifact in artifacts)
    if ours.proof.parameters != base.proof.parameters or ours.proof.parameter_count != base.proof.parameter_count:
        raise SystemExit("the artifacts differ in their parameters")
    tables = check(artifacts[0], [str(folder / "data" / "test")], baseline=artifacts[1], rounds=calls)
    print(text_of(tables))
    print(f"\nthe same {len(base.proof.parameters)} parameters in both, none of an auxiliary prediction head")
    rows = [dict(zip(("line", "c2al", "baseline", "ratio"), row, strict=True)) for row in tables[1][1:]]
    if rows[1]["c2al"] != rows[1]["baseline"]:
        raise SystemExit("the artifacts differ in their FLOPs")
    return rows


def speed(folder: Path, rounds: int, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Rows per second, the parts in turn. Ends the script where `predict` is not `score`."""
    data = [str(folder / "data" / split) for split in SPLITS]
    artifact, outputs = folder / "c2al-artifact", folder / "predictions"
    shutil.rmtree(outputs, ignore_errors=True)
    with process_group(DistConfig(device="cpu")) as world:
        run = on_cpu(open_run(folder / "c2al"))
        training = CheckpointReader(run.checkpoints, world).with_newest(lambda p: TrainingModel(run, p, world))
        ready = list(batches(run.config, run, data))
        rows = sum(batch.rows for batch in ready)

        def forward() -> None:
            for batch in ready:
                training.predict(batch)

        @torch.no_grad()
        def program(predictor: Predictor) -> None:
            for batch in ready:
                predictor.program(*arguments(batch))

        calls: dict[str, Callable[[], object]] = {
            FORWARD: forward,
            "c2al score": lambda: score(folder / "c2al", data, fresh(outputs / "score"), world, config=run.config),
        }
        for variant in variants:
            served = Predictor(artifact, variant)
            calls[f"{variant} program, forward"] = lambda p=served: program(p)
            calls[f"c2al predict, {variant}"] = lambda p=served: predict(p, data, fresh(outputs / p.variant))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    if "float" in variants:
        scored, predicted = (pq.read_table(outputs / n, columns=["prediction"]) for n in ("score", "float"))
        if not scored.equals(predicted):
            raise SystemExit("c2al predict does not give the predictions of c2al score")
        print(f"\n{rows:,} rows; predictions of `c2al predict` equal those of `c2al score` bit for bit")
    return [shown(name, rows, values, seconds[FORWARD]) for name, values in seconds.items()]


def fresh(folder: Path) -> Path:
    """The path, with nothing there; what lay there is of an earlier round."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def shown(name: str, rows: int, seconds: Sequence[float], forward: Sequence[float]) -> dict[str, Any]:
    per_second = rows / statistics.median(seconds)
    share = statistics.median(b / s for s, b in zip(seconds, forward, strict=True))
    print(f"{name:26} {per_second:12,.0f} rows/s  {share:6.2f} of the training model's forward")
    return {"line": name, "rows": rows, "rows_per_s": round(per_second), "of_forward": round(share, 3)}


if __name__ == "__main__":
    main()
