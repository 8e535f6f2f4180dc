"""`c2al experiment`: arms against the baseline over paired seeds, and one report."""

import argparse
import shlex
import sys
from pathlib import Path

from c2al.config import load_config
from c2al.distributed.process import World, process_group
from c2al.errors import ConfigError
from c2al.experiment.bench import Share
from c2al.experiment.run import experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="TOML configuration")
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of the experiment; an interrupted one goes on"
    )
    add_share_arguments(parser)


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """--arms and --seeds: the part of the experiment that this process takes."""
    parser.add_argument("--arms", default="", help="names with commas; other processes train the other arms")
    parser.add_argument("--seeds", default="", help="numbers with commas; other processes train the other seeds")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    with process_group(config.dist) as world:
        report = experiment(config, args.output, world, command(), share(args))
        tell(report, args.output, world)


def share(args: argparse.Namespace) -> Share:
    """Raises ConfigError naming the flag and the word that is no seed."""
    seeds = []
    for word in filter(None, args.seeds.split(",")):
        if not word.strip().isdecimal():
            raise ConfigError(f"--seeds: '{word}' is not a seed; write numbers with commas, such as 0,1,2")
        seeds.append(int(word))
    return Share(arms=tuple(a.strip() for a in args.arms.split(",") if a.strip()), seeds=tuple(seeds))


def command() -> str:
    """The command line, for the report."""
    return shlex.join(["c2al", *sys.argv[1:]])


def tell(report: Path | None, output: Path, world: World) -> None:
    """What the job prints last."""
    if world.rank == 0:
        print(
            f"report: {report}" if report else f"{output}: other processes are at work; the last one writes the report"
        )
