"""`c2al predict`: an exported model's predictions of raw rows. Needs torch, pyarrow and numpy only."""

import argparse
from pathlib import Path

from c2al.errors import ConfigError
from c2al.serving.artifact import VARIANTS
from c2al.serving.predict import Predictor, predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifact", required=True, type=Path, help="folder that `c2al export` wrote")
    parser.add_argument("--data", required=True, nargs="+", help="raw rows: Parquet files, folders, globs or URIs")
    parser.add_argument("--output", required=True, type=Path, help="folder of the predictions; must not exist")
    parser.add_argument("--variant", choices=VARIANTS, default="float", help="program to run (default: float)")
    parser.add_argument("--batch-size", type=int, help="rows of a step (default: the run's)")
    parser.add_argument("--carry", nargs="*", help="columns to hand through (default: the row id, where there is one)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: predict takes no configuration, not {' '.join(overrides)}")
    predictor = Predictor(args.artifact, args.variant)
    rows = predict(predictor, args.data, args.output, args.batch_size, args.carry)
    print(f"{rows:,} rows predicted into {args.output}")
