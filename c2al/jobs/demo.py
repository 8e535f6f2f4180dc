"""`c2al demo`: an experiment on synthetic impressions with a known truth, a few minutes on a laptop."""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from c2al.config import load_config, replace
from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.process import process_group
from c2al.experiment.run import experiment
from c2al.jobs.experiment import add_share_arguments, command, share, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of data and results")
    add_share_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    data = args.output / "data"
    with as_file(files("c2al.configs") / "demo.toml") as path:
        config = load_config(path, overrides)
    config = replace(config, **{f"data.{split}": [str(data / split)] for split in ("train", "validation", "test")})
    with process_group(config.dist) as world:

        def make_data() -> None:
            if not data.exists():
                synthesise(SynthConfig(seed=config.seed), data)

        world.once(make_data)
        tell(experiment(config, args.output, world, command(), share(args)), args.output, world)
