"""`c2al demo`: an experiment on synthetic impressions with planted cohorts, a few minutes on a laptop."""

import argparse
import shlex
import sys
from importlib.resources import files
from pathlib import Path

from c2al.config import load_config, replace
from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.process import process_group
from c2al.experiment.run import experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of data and results")
    parser.add_argument("--rows", type=int, default=400_000, help="impressions to synthesise")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    data = args.output / "data"
    config = load_config(str(files("c2al.configs") / "demo.toml"), overrides)
    config = replace(config, **{f"data.{split}": [str(data / split)] for split in ("train", "validation", "test")})
    with process_group(config.dist) as world:

        def make_data() -> None:
            if not data.exists():
                synthesise(SynthConfig(rows=args.rows, seed=config.seed), data)

        world.once(make_data)
        report = experiment(config, args.output, world, command=shlex.join(["c2al", *sys.argv[1:]]))
        if world.rank == 0:
            print(f"report: {report}")
