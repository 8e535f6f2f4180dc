"""`c2al describe`: layers, parameters and FLOPs of a configuration or a run, or the plan of its tables.

Reads no data and trains nothing.
"""

import argparse
from pathlib import Path

from c2al.config import Config, load_config
from c2al.errors import ConfigError
from c2al.experiment.describe import arms_table, auxiliary_cohorts, describe_arms
from c2al.experiment.plan import arms_of
from c2al.files import write_atomically
from c2al.training.describe import describe, plan_for
from c2al.training.run_folder import open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="TOML configuration")
    source.add_argument("--run", type=Path, help="folder of a training run: its configuration and its cohorts")
    parser.add_argument(
        "--cohorts", type=int, metavar="N", help="auxiliary cohorts (default: the most that an arm of --config has)"
    )
    parser.add_argument(
        "--ranks",
        metavar="HOSTSxRANKS",
        help="instead of the layers, the planner's placement of the tables on so many hosts and ranks per host, "
        "which need not be there: e.g. 8x8 with --dist.device cuda --dist.hbm_gib 80",
    )
    parser.add_argument("--csv", action="store_true", help="the layers as CSV")
    parser.add_argument("--output", type=Path, help="file to write (default: the terminal)")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.ranks and args.csv:
        raise ConfigError("--csv: is of the layers, and --ranks shows none")
    if args.output is not None and args.output.exists():
        raise ConfigError(f"{args.output}: exists; give another --output")
    config, cohorts = _of_run(args, overrides) if args.run else _of_config(args, overrides)
    text = f"{plan_for(config, args.ranks)}\n" if args.ranks else _layers(args, config, cohorts)
    if args.output is None:
        print(text, end="")
    else:
        write_atomically(args.output, text)


def _layers(args: argparse.Namespace, config: Config, cohorts: int) -> str:
    model = describe(config, cohorts)
    if args.csv:
        return model.csv()
    text = f"{cohorts} auxiliary cohorts\n{model.table()}\n"
    if not args.run and args.cohorts is None:
        text += f"\n{arms_table(describe_arms(config))}\n"
    return text


def _of_run(args: argparse.Namespace, overrides: list[str]) -> tuple[Config, int]:
    if overrides or args.cohorts is not None:
        raise ConfigError("command line: --run is described as it is; overrides and --cohorts go with --config")
    run = open_run(args.run)
    return run.config, len(run.auxiliary)


def _of_config(args: argparse.Namespace, overrides: list[str]) -> tuple[Config, int]:
    config = load_config(args.config, overrides)
    if args.cohorts is None:
        return config, max(auxiliary_cohorts(arm, config) for arm in arms_of(config))
    if args.cohorts < 0:
        raise ConfigError(f"--cohorts: must not be negative, is {args.cohorts}")
    return config, args.cohorts
