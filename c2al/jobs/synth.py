"""`c2al synth`: impressions with planted cohorts, and the Bayes NE of each."""

import argparse
from pathlib import Path

from c2al.data.synthetic import COHORTS, SynthConfig, synthesise
from c2al.errors import ConfigError

DEFAULT = SynthConfig(rows=300_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--rows", type=int, default=DEFAULT.rows, help="impressions over all splits (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed)
    parser.add_argument("--users", type=int, default=DEFAULT.users)
    parser.add_argument("--items", type=int, default=DEFAULT.items)
    parser.add_argument("--zipf", type=float, default=DEFAULT.zipf, help="exponent of their frequencies (%(default)s)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs=len(COHORTS),
        default=DEFAULT.rates,
        metavar=tuple(c.upper() for c in COHORTS),
        help="share of positives in each cohort, e.g. 0.0008 0.0014 0.0003 (%(default)s)",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: unknown argument {overrides[0]}")
    config = SynthConfig(
        rows=args.rows, seed=args.seed, users=args.users, items=args.items, zipf=args.zipf, rates=tuple(args.rates)
    )
    truth = synthesise(config, args.output)
    print(f"{'split':<12}{'cohort':<10}{'rows':>10}{'positives':>11}{'Bayes NE':>10}")
    for split, parts in truth.items():
        for name, part in parts.items():
            ne = "undefined" if part.bayes_ne is None else f"{part.bayes_ne:.4f}"
            print(f"{split:<12}{name:<10}{part.rows:>10,}{part.positives:>11,}{ne:>10}")
    print(f"wrote {args.output}")
