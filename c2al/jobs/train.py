"""`c2al train`: one model on Parquet impressions, with or without the auxiliary losses of C2AL."""

import argparse
from pathlib import Path

from c2al.config import load_config
from c2al.distributed.process import process_group
from c2al.training.trainer import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="TOML configuration")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run; an interrupted one goes on")
    parser.add_argument("--cohorts", type=Path, help="cohorts.json of `c2al discover`, for a C2AL run")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    with process_group(config.dist) as world:
        train(config, args.output, world, args.cohorts)
