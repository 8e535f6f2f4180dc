"""`c2al demo`: two experiments on synthetic impressions whose truth is known, a few minutes on a laptop.

In the world `privileged`, a segment that training knows and serving does not decides who clicks on what;
C2AL has something to gain there. In the world `homogeneous` there is nothing to gain: no pair of cohorts
differs beyond noise, and a pair drawn at random shows what C2AL does without a reason.
"""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from c2al.config import load_config, replace
from c2al.data.synthetic import LatentConfig, WorldName, synthesise
from c2al.distributed.process import process_group
from c2al.experiment.run import experiment
from c2al.jobs.experiment import add_share_arguments, command, share, tell

WORLDS: tuple[WorldName, ...] = ("privileged", "homogeneous")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of data and results")
    add_share_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    with as_file(files("c2al.configs") / "demo.toml") as path:
        config = load_config(path, overrides)
    with process_group(config.dist) as world:
        for name in WORLDS:
            output = args.output / name
            data = output / "data"
            paths = {f"data.{split}": [str(data / split)] for split in ("train", "validation", "test")}

            def make_data(name: WorldName = name, data: Path = data) -> None:
                if not data.exists():
                    synthesise(LatentConfig(world=name, seed=config.seed), data)

            world.once(make_data)
            if world.rank == 0:
                print(f"\nworld {name}:")
            tell(experiment(replace(config, **paths), output, world, command(), share(args)), output, world)
