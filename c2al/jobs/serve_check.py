"""`c2al serve-check`: an artifact's variants against the training model, and its cost beside a baseline's."""

import argparse
import contextlib
from pathlib import Path

from c2al.errors import ConfigError
from c2al.files import new_folder, write_atomically
from c2al.serving.check import Floats, check, csv_of, text_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifact", required=True, type=Path, help="folder that `c2al export` wrote")
    parser.add_argument("--data", required=True, nargs="+", help="held-out impressions with labels")
    parser.add_argument("--baseline", type=Path, help="artifact of a baseline, timed in turn with the other")
    parser.add_argument("--run", type=Path, help="training run to compare with (default: the artifact's own proof)")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls per batch size (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for serve_check.csv, besides the terminal; must not exist")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ConfigError(f"command line: serve-check takes no configuration, not {' '.join(overrides)}")
    with new_folder(args.output) if args.output else contextlib.nullcontext() as folder:
        expected_N = None if args.run is None else _training_model(args.run, args.data)
        tables = check(args.artifact, args.data, expected_N, args.baseline, args.rounds)
        print(text_of(tables))
        if folder is not None:
            write_atomically(folder / "serve_check.csv", csv_of(tables))


def _training_model(run: Path, data: list[str]) -> Floats:
    # Imported here: without --run the job needs no torchrec, and a serving machine has none.
    from c2al.config import DistConfig
    from c2al.distributed.process import process_group
    from c2al.serving.reference import predictions

    with process_group(DistConfig(device="cpu")) as world:
        return predictions(run, data, world)
