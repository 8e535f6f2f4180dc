"""`c2al experiment`: baseline against C2AL over paired seeds, and one report."""

import argparse
import shlex
import sys
from pathlib import Path

from c2al.config import load_config
from c2al.distributed.process import process_group
from c2al.experiment.run import experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="TOML configuration")
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of the experiment; an interrupted one goes on"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    with process_group(config.dist) as world:
        report = experiment(config, args.output, world, command=shlex.join(["c2al", *sys.argv[1:]]))
        if world.rank == 0:
            print(f"report: {report}")
