"""`c2al train`: one model on Parquet impressions, with or without the auxiliary losses of C2AL."""

import argparse
from pathlib import Path

from c2al.config import load_config
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.training.start_from import Start
from c2al.training.trainer import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="TOML configuration")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run; an interrupted one goes on")
    parser.add_argument("--cohorts", type=Path, help="cohorts.json of `c2al discover`, for a C2AL run")
    parser.add_argument("--start-from", type=Path, metavar="RUN", help="run whose weights this one begins with")
    parser.add_argument("--start-optimizer", action="store_true", help="with --start-from: its optimizer state, too")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    if args.start_optimizer and args.start_from is None:
        raise ConfigError("--start-optimizer: without effect, since there is no --start-from")
    start = None if args.start_from is None else Start(run=args.start_from, optimizer=args.start_optimizer)
    with process_group(config.dist) as world:
        train(config, args.output, world, args.cohorts, start=start)
