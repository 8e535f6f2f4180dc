"""`c2al score`: a trained model's predictions on any Parquet impressions."""

import argparse
from pathlib import Path

from c2al.config import load_config
from c2al.distributed.process import process_group
from c2al.training.run_folder import open_run
from c2al.training.score import score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files, folders, globs or URIs")
    parser.add_argument("--output", required=True, type=Path, help="folder of the scores; must not exist")
    parser.add_argument("--checkpoint", type=Path, help="one of the run's checkpoints (default: the newest)")
    parser.add_argument("--batch-size", type=int, help="rows of a step over all ranks (default: the run's)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    open_run(args.run)  # says what is missing where this is no run's folder
    config = load_config(args.run / "config.toml", overrides)
    with process_group(config.dist) as world:
        rows = score(args.run, args.data, args.output, world, args.checkpoint, args.batch_size, config)
        if world.rank == 0:
            print(f"{rows:,} rows scored into {args.output}")
