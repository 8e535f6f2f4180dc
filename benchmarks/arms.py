"""What does a training step of each arm of an experiment cost, and its model at serving?

    python benchmarks/arms.py --config docs/results/methods-planted.toml --cohorts RUN/cohorts-*/cohorts.json

The baseline and every arm (the first combination of its `select`) take turns on batches in memory, everything a step
does included: pipeline, tasks' gradients, update, metrics, and the Gramian on steps that are logged. The time is CPU
time of this process. Other work on the machine only adds to it (caches, a core shared by two threads), so the fastest
round of an arm is set against the fastest of the baseline; the median of the ratios round by round stands beside it and
says how quiet the machine was. Parameters and FLOPs are those of `c2al describe`. Arms with cohorts other than chosen
ones take the chosen ones: the cost is the same.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import RESULTS, about, write_table

from c2al.config import BASELINE, Arm, Config, load_config
from c2al.data.cohorts import read_cohorts, write_cohorts
from c2al.distributed.process import World, process_group
from c2al.experiment.describe import describe_arms
from c2al.experiment.plan import arm_trials, arms_of, baseline_trials
from c2al.text import table
from c2al.training.batches import training_reader
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer

KEPT = 8
"""Batches of every arm that stay in memory."""


def stepper(arm: Arm | None, config: Config, cohorts: Path, world: World, folder: Path) -> Callable[[], None]:
    """Does one training step of the arm; None: of the baseline."""
    trial = baseline_trials(config)[0] if arm is None else arm_trials(arm, config, ())[0]
    needed = None
    if arm is not None and arm.cohorts != "none":
        needed = folder / f"{arm.name}.json"
        chosen = read_cohorts(arm.file if arm.cohorts == "file" else cohorts).chosen()
        kept = [c for c in chosen if arm.cohorts != "one" or c.label == arm.keep]
        write_cohorts(needed, kept, "chosen")
    run = start_run(folder / (arm.name if arm else BASELINE), trial.config, needed, world, folder / BASELINE)
    trainer = Trainer(run, world)
    batches = itertools.cycle(list(itertools.islice(iter(training_reader(run, world)), KEPT)))
    return lambda: trainer.advance(batches)


def measure(arms: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Arm -> CPU seconds of `steps` steps in each round; the first round, which warms up, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        # The caches belong to whoever went before.
        for name in sorted(arms, reverse=round_ % 2 == 0):
            begun = time.process_time()
            for _ in range(steps):
                arms[name]()
            seconds[name].append(time.process_time() - begun)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML configuration of the experiment")
    parser.add_argument("--cohorts", type=Path, required=True, help="cohorts.json that its discovery wrote")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50, help="steps of each arm in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "arms.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(args.config)
    described = describe_arms(config)
    with tempfile.TemporaryDirectory() as name, process_group(config.dist) as world:
        declared: dict[str, Arm | None] = {BASELINE: None, **{a.name: a for a in arms_of(config)}}
        arms = {n: stepper(a, config, args.cohorts, world, Path(name)) for n, a in declared.items()}
        seconds = measure(arms, args.rounds, args.steps)
    rows = []
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(seconds[BASELINE], times, strict=True)]
        _, _, every, served, _ = described[name].totals
        rows.append(
            {
                "arm": name,
                "samples_per_cpu_second": round(config.train.batch_size * args.steps / min(times)),
                "relative_to_baseline": round(min(seconds[BASELINE]) / min(times), 3),
                "median_of_rounds": round(statistics.median(ratios), 3),
                "parameters": every.parameters,
                "served_parameters": served.parameters,
                "flops_training": every.training,
                "flops_serving": every.serving,
                **about(),
            }
        )
    shown = list(rows[0])[:-3]
    print(table([shown, *([str(r[k]) for k in shown] for r in rows)]))
    write_table(args.output, rows)


if __name__ == "__main__":
    main()
