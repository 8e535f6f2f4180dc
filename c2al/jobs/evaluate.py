"""`c2al evaluate`: NE, NE_diff, calibration and AUC of scored runs, overall, head, tail and by segment."""

import argparse
import sys
from pathlib import Path

from c2al.config import load_config, save_config
from c2al.evaluation.evaluate import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="TOML configuration")
    runs = parser.add_mutually_exclusive_group(required=True)
    runs.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("BASELINE", "C2AL"),
        help="score folders of the two runs of one seed; repeat for each seed",
    )
    runs.add_argument("--scores", help="score folder of a single run")
    parser.add_argument("--cohorts", type=Path, help="cohorts.json of `c2al discover`: head, tail and all its axes")
    parser.add_argument("--output", required=True, type=Path, help="folder of evaluation.json and evaluation.csv")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    runs = [tuple(pair) for pair in args.pair] if args.pair else [(args.scores,)]
    if args.cohorts is None and (cut := [axis.name for axis in config.axes if axis.kind != "categorical"]):
        print(f"axes left out, since their cuts are in a cohorts.json: {', '.join(cut)}", file=sys.stderr)
    evaluation = evaluate(runs, args.cohorts, config.axes, config.evaluate, config.seed, args.output, config.data)
    print(evaluation.table())
    save_config(config, args.output / "config.toml")
