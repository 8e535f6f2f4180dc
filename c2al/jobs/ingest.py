"""`c2al ingest`: a published data set as Parquet splits by time."""

import argparse
from pathlib import Path

from c2al.data.ingest import avazu, criteo, kuairand, movielens
from c2al.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=("kuairand", "movielens1m", "criteo", "avazu"))
    parser.add_argument("--input", type=Path, required=True, help="folder or file as published")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--label", choices=kuairand.LABELS, help="kuairand only: what is predicted (is_click)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: unknown argument {overrides[0]}")
    if args.label and args.dataset != "kuairand":
        raise ConfigError(f"--label: {args.dataset} has one label only")
    if args.dataset == "kuairand":
        rows = kuairand.ingest(args.input, args.output, args.label or kuairand.LABELS[0])
    else:
        modules = {"movielens1m": movielens, "criteo": criteo, "avazu": avazu}
        rows = modules[args.dataset].ingest(args.input, args.output)
    for split, count in rows.items():
        print(f"{split:<12}{count:>13,} rows")
    for split in [split for split, count in rows.items() if not count]:
        print(f"{args.input} holds no row of the split {split}: no job can use that split")
    print(f"wrote {args.output}")
