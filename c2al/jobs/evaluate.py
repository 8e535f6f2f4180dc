"""`c2al evaluate`: scored arms over seeds, compared overall, on head and tail and by segment."""

import argparse
import sys
from pathlib import Path

from c2al.config import load_config, save_config
from c2al.errors import ConfigError
from c2al.evaluation.evaluate import BASELINE, arm, evaluate, paired
from c2al.evaluation.result import Arm
from c2al.files import refuse_foreign

_OWN = ("evaluation.json", "evaluation.csv", "config.toml")
"""Names that a folder of this job may hold. A run's config.toml is not to be replaced by an evaluation's."""


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
    runs.add_argument("--baseline", metavar="FOLDER[,FOLDER...]", help="score folders of the baseline, one per seed")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,FOLDER...]",
        help="score folders of an arm, in the order of the baseline's seeds; may stop early; repeat for each arm",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar=("ARM", "AGAINST"),
        help="compares two arms besides each arm with the baseline; repeat for each pair",
    )
    parser.add_argument("--cohorts", type=Path, help="cohorts.json of `c2al discover`: head, tail and all its axes")
    parser.add_argument("--output", required=True, type=Path, help="folder of evaluation.json and evaluation.csv")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(args.config, overrides)
    arms = _arms(args)
    refuse_foreign(args.output, _OWN, "evaluate")
    if args.cohorts is None and (cut := [axis.name for axis in config.axes if axis.kind != "categorical"]):
        print(f"axes left out, since their cuts are in a cohorts.json (--cohorts): {', '.join(cut)}", file=sys.stderr)
    comparisons = [(a, against) for a, against in args.compare]
    evaluation = evaluate(
        arms, args.cohorts, config.axes, config.evaluate, config.seed, args.output, config.data, comparisons
    )
    print(evaluation.table())
    save_config(config, args.output / "config.toml")


def _arms(args: argparse.Namespace) -> tuple[Arm, ...]:
    if args.baseline is None:
        if args.arm:
            raise ConfigError("--arm: needs --baseline, the folders that it is compared with")
        return paired(args.pair or [(args.scores,)])
    arms = [arm(BASELINE, args.baseline.split(","))]
    for text in args.arm:
        name, equals, folders = text.partition("=")
        if not (name and equals and folders):
            raise ConfigError(f"--arm {text}: expected NAME=FOLDER[,FOLDER...]")
        arms.append(arm(name, folders.split(",")))
    return tuple(arms)
